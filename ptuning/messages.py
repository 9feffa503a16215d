"""What training and evaluation say on the console, in Chinese and English."""

from ptuning.language import Texts

message = Texts(
    {
        # data
        "split": (
            "{name}：{file} 共 {rows} 条{guessed}{skipped}{mixed_in}",
            "{name}: {rows} rows of {file}{guessed}{skipped}{mixed_in}",
        ),
        "skipped": ("，跳过无效的 {rows} 条", ", {rows} invalid rows skipped"),
        "encoded": ("{name}：{report}", "{name}: {report}"),
        "lengths": (
            "{rows} 条，平均 {mean:.0f} 个 token，最长 {longest}",
            "{rows} rows, {mean:.0f} tokens on average, longest {longest}",
        ),
        "dropped_systems": (
            "{count} 条去掉了系统提示（超过 max_source_length 的一半）",
            "{count} rows lost their system text (more than half of max_source_length)",
        ),
        "dropped_turns": ("{count} 条去掉了最早的轮次", "{count} rows lost old turns"),
        "cut_questions": ("{count} 个问题从中间截短", "{count} questions cut in the middle"),
        "cut_answers": ("{count} 个回答被截断（没有结束符）", "{count} answers cut (no end token)"),
        "changed_rows": ("，例如 {rows}", ", e.g. {rows}"),
        # estimate
        "estimate": (
            "估算：{method}，基座 {parameters:.3g} B 参数{precision}，{processes} 个进程（本机 {local} 个），{how}，{batch} 条 × "
            "{length} token，梯度检查点{checkpointing}",
            "Estimate for {method}, base of {parameters:.3g} B parameters{precision}, {processes} process{es} ({local} on this "
            "node), {how}, {batch} rows × {length} tokens, gradient checkpointing {checkpointing}",
        ),
        "in_precision": ("（{name}）", " in {name}"),
        "on": ("开", "on"),
        "off": ("关", "off"),
        "no_deepspeed": ("不用 DeepSpeed", "no DeepSpeed"),
        "offload": ("，卸载到 {device}", ", offload to {device}"),
        "memory per GPU": ("每张 GPU 显存", "memory per GPU"),
        "host memory per node": ("每台机器内存", "host memory per node"),
        "disk for checkpoints": ("检查点所需磁盘", "disk for checkpoints"),
        "need": ("  {name} {size:>9}{judged}（{parts}）", "  {name} {size:>9} {judged}  ({parts})"),
        "judged": ("，可用 {free:>9}：{state}", "of {free:>9} free: {state}"),
        "not_told": ("（现有多少：{flag}）", "(what there is: {flag})"),
        "fits": ("够用", "fits"),
        "tight": ("紧张", "tight"),
        "too much": ("不够", "too much"),
        # a base on a CPU
        "fast_kernels": (
            "CPU 内核：fast，{how}（--cpu_kernels exact 为官方算法的精确结果，更慢）",
            "CPU kernels: fast, {how} (--cpu_kernels exact: the official arithmetic, slower)",
        ),
        "exact_kernels": ("CPU 内核：exact", "CPU kernels: exact"),
        "no_fast_kernels": ("CPU 内核：exact，而不是 fast：{why}", "CPU kernels: exact instead of fast: {why}"),
        "not_quantized": (
            "基座没有量化（--quantization_bit 8 或 4）",
            "the base isn't quantised (--quantization_bit 8 or 4)",
        ),
        "not_on_a_cpu": ("基座不在 CPU 上", "the base isn't on a CPU"),
        "packed_products_fail": (
            "本机的 torch 没有这些内核，或结果不对",
            "torch's packed products are missing or wrong on this machine",
        ),
        "no_float16_on_cpu": (
            "注意：CPU 上 float16 慢得多，改用 bfloat16",
            "note: float16 is many times slower on a CPU; the base is in bfloat16 instead",
        ),
        # training
        "finished": (
            "{checkpoint} 已是训练的终点，没有剩下的步数",
            "{checkpoint} is the end of a finished run; nothing is left to do",
        ),
        "start_from": (
            "以 {folder} 的权重（{noun}）开始一次新的训练（续训请用 --resume_from_checkpoint）",
            "Starting a new run from the {noun} in {folder} (to continue a run: --resume_from_checkpoint)",
        ),
        "other_precision": (
            "注意：{folder} 是在 {there} 的基座上训练的，现在的基座是 {here}；实测：4 bit 与其他精度互换，损失增加 0.06 到 0.13，"
            "8 bit 与 16 bit 互换没有差别",
            "note: {folder} was trained on a base in {there}, and this one is in {here}; measured: 0.06 to 0.13 more loss between "
            "4 bit and the others, none between 8 and 16 bit",
        ),
        "unquantized": ("16 bit", "16 bit"),
        "trainable": (
            "训练 {total:,} 个参数中的 {trainable:,} 个（{share:.3%}），数据 {rows:,} 条",
            "Training {trainable:,} of {total:,} parameters ({share:.3%}) on {rows:,} rows",
        ),
        "steps": (
            "  有效批量 {effective} = {batch} 条 × {accumulation} 次累积 × {processes} 个进程；{steps:,} 步 = {epochs:.2f} 轮",
            "  effective batch {effective} = {batch} rows × {accumulation} accumulation steps × {processes} processes; "
            "{steps:,} steps = {epochs:.2f} epochs",
        ),
        "schedule": (
            "  学习率 {rate:g}，{schedule} 调度，设备 {device}",
            "  learning rate {rate:g}, {schedule} schedule, device {device}",
        ),
        "row_averages": (
            "  损失：先对每次前向的标签取平均（--loss_average rows）",
            "  loss: the mean of each forward pass's labels first (--loss_average rows)",
        ),
        "continuing": ("  从 {checkpoint} 继续训练", "  continuing the run at {checkpoint}"),
        "saved": ("微调结果（{noun}）已保存到 {folder}", "Saved the tuned {noun} in {folder}"),
        "best": (
            "最佳：{checkpoint}，{metric} {value:.4f}；保存的就是它的权重",
            "Best: {checkpoint} with {metric} {value:.4f}; its weights are the ones saved",
        ),
        "next": ("接下来：", "Next:"),
        # evaluation
        "validation": (
            "验证集：损失 {eval_loss:.4f}，困惑度 {eval_perplexity:.2f}",
            "Validation: loss {eval_loss:.4f}, perplexity {eval_perplexity:.2f}",
        ),
        "answering_tuned": ("微调后的模型回答 {rows} 条", "Answering {rows} rows with the tuned model"),
        "answering_base": ("未微调的基座回答 {rows} 条", "Answering {rows} rows with the untuned base"),
        "seconds": ("  {seconds:.1f} 秒", "  {seconds:.1f} s"),
        "answered_before": (
            "{file}：{rows} 条中的 {done} 条以前已回答，继续回答其余的",
            "{file}: {done} of {rows} rows were answered before; going on with the others",
        ),
        "base": ("基座", "base"),
        "tuned": ("微调后", "tuned"),
        "rows": ("条数", "rows"),
        "probe": (
            "遗忘探测：{rows} 个通用问题中 {same:.0f} % 的回答没有变化",
            "Probe: {same:.0f} % of {rows} general answers unchanged",
        ),
        "probe_losses": (
            "；基座自己的回答的损失：之前 {base_loss:.3f}，之后 {tuned_loss:.3f}",
            "; loss of the base's own answers {base_loss:.3f} before, {tuned_loss:.3f} after",
        ),
        "results": ("已写入 {file}，预测结果在同一目录", "Wrote {file} and the predictions beside it"),
        "report": ("报告：{file}", "Report: {file}"),
        "wrote": ("已写入 {file}", "Wrote {file}"),
    }
)


def silent(*_: object) -> None:
    """Stands for print where nothing is said: on all but the first process, beside JSON."""
