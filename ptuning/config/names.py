"""Names that people bring from the official scripts, from older versions of transformers and from other toolkits.

Those with one meaning here are accepted (RENAMED, WITHOUT_EFFECT); to the others there is an answer (ANSWERS).
"""

import difflib
from collections.abc import Collection

from ptuning.language import Texts

# Older names of options that are there.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "generation_num_beams": "num_beams",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "torch_dtype": "dtype",
    "lora_r": "lora_rank",
    "lora_target_modules": "lora_target",
    "target_modules": "lora_target",
}

# Flags of the official command lines that have nothing left to do, with the values for which that is so (empty: all). They
# run, and one line says why.
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "use_fast_tokenizer": (),
    "resize_position_embeddings": (),
    "lang": (),
    "trust_remote_code": (),
    "ignore_pad_token_for_loss": ("true", ""),
    "group_by_length": ("true", ""),
}
WHY_WITHOUT = Texts(
    {
        "use_fast_tokenizer": ("基座只有一个 tokenizer", "a base has one tokenizer"),
        "resize_position_embeddings": (
            "位置编码是旋转式的，没有什么可调整大小",
            "the positions are rotary, there is nothing to resize",
        ),
        "lang": ("模板是模型自己的", "the template is the model's own"),
        "trust_remote_code": ("不运行模型目录里的代码", "no code of the model's folder is run"),
        "ignore_pad_token_for_loss": ("填充从不计入损失", "padding never counts"),
        "group_by_length": (
            "各条已按长度分组，除非 --train_sampling_strategy 另有规定",
            "rows are grouped by length unless --train_sampling_strategy says otherwise",
        ),
    }
)

_METHOD = "use --method prefix, lora, lora+prefix or full"
_INIT = "the first factor starts as --lora_init default, gaussian or orthogonal says; others of peft change the base's own weights"
_PRECISION = "use --quantization_bit 8 or 4 (the official integers), or --quantization nf4 (bitsandbytes)"
_NAMED = "a model is one folder; give it with --model_name_or_path"
_LENGTHS = "use --max_source_length and --max_target_length (tokens of question and answer)"

ANSWERS = {
    "lr": "use --learning_rate",
    "batch_size": "use --per_device_train_batch_size (rows a step and device) or --per_device_eval_batch_size",
    "micro_batch_size": "use --per_device_train_batch_size",
    "train_batch_size": "use --per_device_train_batch_size",
    "eval_batch_size": "use --per_device_eval_batch_size",
    "epochs": "use --num_train_epochs",
    "num_epochs": "use --num_train_epochs",
    "grad_accum": "use --gradient_accumulation_steps",
    "accumulation_steps": "use --gradient_accumulation_steps",
    "steps": "use --max_steps",
    "scheduler": "use --lr_scheduler_type",
    "cutoff_len": _LENGTHS,
    "max_length": _LENGTHS,
    "max_seq_length": _LENGTHS,
    "max_seq_len": _LENGTHS,
    "generation_max_length": "use --val_max_target_length (new tokens of an answer)",
    "max_new_tokens": "use --val_max_target_length (new tokens of an answer)",
    "finetuning_type": _METHOD,
    "tuner_type": _METHOD,
    "train_type": _METHOD,
    "stage": "there is one kind of training: on questions and answers; leave it out",
    "template": "the template is the model's own; leave it out",
    "dataset": "use --train_file FILE",
    "dataset_dir": "use --train_file FILE",
    "data_path": "use --train_file FILE",
    "train_data": "use --train_file FILE",
    "eval_dataset": "use --validation_file FILE",
    "val_size": "give the validation rows in a file of their own: --validation_file FILE",
    "model": "use --model_name_or_path",
    "model_path": "use --model_name_or_path",
    "adapter_name_or_path": "use --ptuning_checkpoint",
    "checkpoint_dir": "use --ptuning_checkpoint",
    "output": "use --output_dir",
    "save_dir": "use --output_dir",
    "num_virtual_tokens": "use --pre_seq_len",
    "prefix_len": "use --pre_seq_len",
    "adapter_path": "use --ptuning_checkpoint",
    "adapter_folder": "use --ptuning_checkpoint",
    "lora_path": "use --ptuning_checkpoint",
    "lora_checkpoint": "use --ptuning_checkpoint",
    "lora_weights": "use --ptuning_checkpoint",
    "resume_lora_training": "use --ptuning_checkpoint",
    "additional_target": "only a LoRA's factors are trained beside the base; leave it out, or tune --method full",
    "modules_to_save": "only a LoRA's factors are trained beside the base; leave it out, or tune --method full",
    "lora_bias": "only a LoRA's factors are trained beside the base; leave it out",
    "pissa_init": _INIT,
    "init_lora_weights": _INIT,
    "loraplus_lr_ratio": "both factors have one rate, --learning_rate; leave it out",
    "use_lora": "use --method lora",
    "use_peft": "use --method lora",
    "peft_type": _METHOD,
    "load_in_4bit": "use --quantization_bit 4 (the official integers) or --quantization nf4 (bitsandbytes)",
    "load_in_8bit": "use --quantization_bit 8",
    "quantization_method": _PRECISION,
    "bnb_4bit_quant_type": _PRECISION,
    "bnb_4bit_use_double_quant": "use --double_quantization, with --quantization nf4",
    "bnb_4bit_compute_dtype": "what isn't quantised says it: --dtype, or --bf16 true",
    "tensor_parallel_size": "use --tensor_parallel N",
    "packing": "rows aren't packed: those of similar length share a batch, and little is padded; leave it out",
    "flash_attn": "use --attn_implementation flash_attention_2",
    "neftune_alpha": "use --neftune_noise_alpha",
    "early_stopping": "use --early_stopping_patience N",
    "use_auth_token": "log in once with `hf auth login`, or set HF_TOKEN",
    "token": "log in once with `hf auth login`, or set HF_TOKEN",
    "cache_dir": "set HF_HOME to the folder that downloads go to",
    "model_revision": "download that revision (hf download NAME --revision REV --local-dir DIR) and give its folder",
    "config_name": _NAMED,
    "tokenizer_name": _NAMED,
    "forced_bos_token": "answers begin as the model's template says; leave it out",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR; the default is OUTPUT_DIR/runs",
    "sortish_sampler": "use --train_sampling_strategy group_by_length (the default)",
    "ignore_pad_token_for_loss": "a loss on padding isn't offered; leave it out",
    "group_by_length": "use --train_sampling_strategy random",
    "gpus": "start the run with a launcher: torchrun --nproc-per-node N, or deepspeed --num_gpus N",
    "n_gpu": "start the run with a launcher: torchrun --nproc-per-node N, or deepspeed --num_gpus N",
    "device": "a GPU is used where there is one; --use_cpu true leaves it out",
}

# Values that older command lines have.
OLD_VALUES = {("optim", "adamw_hf"): "adamw_torch"}


def unknown(name: str, known: Collection[str], help_command: str) -> str:
    """What to say about an option that isn't there.

    Args:
        name: with its hyphens.
        known: the options that are, with theirs.
        help_command: lists them.
    """
    answer = ANSWERS.get(name.lstrip("-").replace("-", "_"))
    if answer is not None:
        return f"{name} is no option here: {answer} (all options: {help_command})"
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown option {name}{hint} (all options: {help_command})"
