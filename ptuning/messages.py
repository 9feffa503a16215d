"""What training, evaluation and comparing say on the console, in Chinese and English."""

from ptuning.language import Texts

message = Texts(
    {
        "note": ("注意：{text}", "note: {text}"),
        "interrupted": ("已中断", "interrupted"),
        # options
        "no_effect": ("--{name} 在这里不起作用：{why}", "--{name} has no effect here: {why}"),
        "deepspeed_means_full": (
            "只有 --deepspeed 而没有 --pre_seq_len 时训练全部参数，与官方脚本相同（--method full）",
            "--deepspeed without --pre_seq_len tunes all weights, as the official script does (--method full)",
        ),
        "default_of_method": (
            "--{name} {value}（--method {method} 的默认值）",
            "--{name} {value} (default of --method {method})",
        ),
        # processes and the run's folder
        "process": (
            "进程 {rank}（共 {processes} 个）：主机 {host}，pid {pid}",
            "process {rank} of {processes} has pid {pid} on {host}",
        ),
        "took_over": (
            "接管了 {path}：{whose}写下它的进程已不在运行",
            "took over {path} {whose}which is not running any more",
        ),
        "whose_lock": ("进程 {pid}，开始于 {started}；", "of process {pid}, started {started}, "),
        "no_report": ("没有写出报告：{problem}", "no report was written: {problem}"),
        "no_live_report": (
            "运行期间不再写报告：{problem}",
            "no report is written while the run goes on: {problem}",
        ),
        "longer_run": (
            "{option} 从 {was:g} 变为 {wish:g}：此后学习率按更长的训练的 {schedule} 调度，可能出现跳变",
            "{option} goes from {was:g} to {wish:g}: from here on the learning rate follows the {schedule} schedule of the "
            "longer run, so it may jump",
        ),
        "not_compared": (
            "这次运行的记录里没有选项 {options}，因此没有比较它们",
            "the record of the run doesn't know the options {options}, so they are not compared",
        ),
        # data
        "split": (
            "{name}：{file} 共 {rows} 条{guessed}{skipped}{mixed_in}",
            "{name}: {rows} rows of {file}{guessed}{skipped}{mixed_in}",
        ),
        "guessed": ("{format}，推测", "{format}, guessed"),
        "in_brackets": ("（{text}）", " ({text})"),
        "mixed_in": (
            "{file}{format} {there} 条中的 {rows} 条（比例 {ratio:g}{repeated}）{skipped}",
            "{rows} of {there} rows of {file}{format} (ratio {ratio:g}{repeated}){skipped}",
        ),
        "mixed_repeatedly": ("，每条约 {times:.1f} 次", ", each about {times:.1f} times"),
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
        "and": ("、", ", "),
        "then": ("；", "; "),
        "changed_row": ("{source}（{change}）", "{source} ({change})"),
        "dropped_system": ("去掉系统提示", "system text dropped"),
        "dropped_old_turns": ("去掉最早的 {count} 轮", "{count} old turns dropped"),
        "cut_question": ("问题截短", "question cut"),
        "cut_answer": ("回答截断", "answer cut"),
        # methods
        "prefix_of": ("长度 {length} 的 prefix{projection}", "prefix of {length}{projection}"),
        "projection": ("，带 projection", " with projection"),
        "lora_of": ("{kind}，秩 {rank}，用于 {target}", "{kind} of rank {rank} on {target}"),
        "all weights": ("全部参数", "all weights"),
        # estimate
        "estimate": (
            "估算：{method}，基座 {parameters:.3g} B 参数{precision}，{processes} 个进程（本机 {local} 个），{how}，{batch} 条 × "
            "{length} token，梯度检查点{checkpointing}",
            "Estimate for {method}, base of {parameters:.3g} B parameters{precision}, {processes} process{es} ({local} on this "
            "node), {how}, {batch} rows × {length} tokens, gradient checkpointing {checkpointing}",
        ),
        "checkpointing_on": (
            "梯度检查点：自动打开，否则内存不够（--gradient_checkpointing false 可关闭；约慢三分之一）",
            "Gradient checkpointing is on, because memory would not suffice without it (about a third slower; "
            "--gradient_checkpointing false leaves it off)",
        ),
        "in_precision": ("（{name}）", " in {name}"),
        "on": ("开", "on"),
        "off": ("关", "off"),
        "fast_training": (
            "训练内核：{kernels}，{library}{pieces}（--kernels plain 为 transformers 自己的模块，更慢）",
            "Training kernels: {kernels}, {library}{pieces} (--kernels plain: transformers' own modules, slower)",
        ),
        "plain_kernels": ("训练内核：plain{loss}{pieces}", "Training kernels: plain{loss}{pieces}"),
        "loss_by_liger": ("，损失由 liger-kernel 计算", ", the loss by liger-kernel"),
        "loss_in_chunks": ("，损失分块计算", ", the loss in chunks of labels"),
        "by_onednn": ("矩阵乘法用 oneDNN（实测更快）", "products by oneDNN (measured: faster)"),
        "by_bf16": (
            "冻结的矩阵用 bf16 相乘（不如 fp32 精确；--kernels fast 为 fp32）",
            "frozen matrices multiplied in bf16 (less exact than fp32: --kernels fast)",
        ),
        "by_torch": ("矩阵乘法用 torch 默认的库", "products by torch's default library"),
        "pieces": ("，每次最多 {tokens} 个 token", ", at most {tokens} tokens at a time"),
        "no_deepspeed": ("不用 DeepSpeed", "no DeepSpeed"),
        "offload": ("，卸载到 {device}", ", offload to {device}"),
        "memory per GPU": ("每张 GPU 显存", "memory per GPU"),
        "host memory per node": ("每台机器内存", "host memory per node"),
        "disk for checkpoints": ("检查点所需磁盘", "disk for checkpoints"),
        "need": ("  {name} {size:>9}{judged}（{parts}）", "  {name} {size:>9} {judged}  ({parts})"),
        "judged": ("，可用 {free:>9}：{state}", "of {free:>9} free: {state}"),
        "card": ("显存", "card"),
        "16 bit": ("16 位", "16 bit"),
        "cards": (
            "各种显存能训练什么（基座的精度与峰值 GB，每步 {batch} 行；*：开梯度检查点，**：再加每次一行，–：不行）",
            "What cards can train (the base's precision and the peak in GB, {batch} rows a step; *: with gradient checkpointing, "
            "**: and one row at a time, –: nothing fits)",
        ),
        "not_told": ("（现有多少：{flag}）", "(what there is: {flag})"),
        "fits": ("够用", "fits"),
        "tight": ("紧张", "tight"),
        "too much": ("不够", "too much"),
        "weights": ("权重", "weights"),
        "gathered weights": ("聚集的权重", "gathered weights"),
        "16-bit copies": ("16 位副本", "16-bit copies"),
        "gradients": ("梯度", "gradients"),
        "activations": ("激活", "activations"),
        "optimizer": ("优化器", "optimizer"),
        "optimizer step": ("优化器更新", "optimizer step"),
        "optimizer buffers": ("优化器缓冲区", "optimizer buffers"),
        "DDP buckets": ("DDP 桶", "DDP buckets"),
        "reduce buckets": ("归约桶", "reduce buckets"),
        "CUDA context": ("CUDA 上下文", "CUDA context"),
        "processes": ("进程", "processes"),
        "training": ("训练", "training"),
        "checkpoints": ("检查点", "checkpoints"),
        "tuned model": ("微调结果", "tuned model"),
        "NVMe optimizer": ("NVMe 上的优化器", "NVMe optimizer"),
        "NVMe weights": ("NVMe 上的权重", "NVMe weights"),
        # a base on a CPU
        "fast_kernels": (
            "CPU 内核：fast，{how}（--cpu_kernels exact 为官方算法的精确结果，更慢）",
            "CPU kernels: fast, {how} (--cpu_kernels exact: the official arithmetic, slower)",
        ),
        "exact_kernels": ("CPU 内核：exact", "CPU kernels: exact"),
        "no_fast_kernels": ("CPU 内核：exact，而不是 fast：{why}", "CPU kernels: exact instead of fast: {why}"),
        "not_quantized": (
            "基座没有量化成整数（--quantization_bit 8 或 4）",
            "the base isn't in whole numbers (--quantization_bit 8 or 4)",
        ),
        "not_on_a_cpu": ("基座不在 CPU 上", "the base isn't on a CPU"),
        "packed_products_fail": (
            "本机的 torch 没有这些内核，或结果不对",
            "torch's packed products are missing or wrong on this machine",
        ),
        "slower_kernel": ("{how}，而不是更快的 {faster}：{why}", "{how}, not {faster}, which is faster: {why}"),
        "no_llvmlite": (
            "没有安装 llvmlite，pip install 'ptuning[cpu]'",
            "llvmlite is not installed, pip install 'ptuning[cpu]'",
        ),
        "no_byte_products": ("这个 CPU 没有 AVX2", "this CPU has no AVX2"),
        "no_vnni": ("这个 CPU 没有 VNNI", "this CPU has no VNNI"),
        "no_openmp": ("这个 torch 没有用 OpenMP", "this torch is built without OpenMP"),
        "wrong_products": ("在本机上结果不对", "its results are wrong on this machine"),
        "answers_by_onednn": (
            "回答时的矩阵乘法用 oneDNN（实测更快；--kernels plain 用 torch 默认的库）",
            "Answers: products by oneDNN (measured: faster; --kernels plain: by torch's default library)",
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
            "{folder} 是在 {there} 的基座上训练的，现在的基座是 {here}；实测：4 bit 与其他精度互换，损失增加 0.06 到 0.13，"
            "8 bit 与 16 bit 互换没有差别",
            "{folder} was trained on a base in {there}, and this one is in {here}; measured: 0.06 to 0.13 more loss between 4 bit "
            "and the others, none between 8 and 16 bit",
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
        "token_steps": (
            "  有效批量约 {effective:.1f} 条 = {batch:.1f} 条（每批最多 {tokens:,} 个 token，其中填充占 {padding:.1%}）× "
            "{accumulation} 次累积 × {processes} 个进程；{steps:,} 步 = {epochs:.2f} 轮",
            "  effective batch about {effective:.1f} rows = {batch:.1f} (at most {tokens:,} tokens a batch, {padding:.1%} padding) "
            "× {accumulation} accumulation steps × {processes} processes; {steps:,} steps = {epochs:.2f} epochs",
        ),
        "schedule": (
            "  学习率 {rate:g}，{schedule} 调度，设备 {device}",
            "  learning rate {rate:g}, {schedule} schedule, device {device}",
        ),
        "row_averages": (
            "  损失：先对每次前向的标签取平均（--loss_average rows）",
            "  loss: the mean of each forward pass's labels first (--loss_average rows)",
        ),
        "divided_rows": (
            "  每条数据由 {processes} 个进程分担（--sequence_parallel）",
            "  each row is divided among {processes} processes (--sequence_parallel)",
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
        "memory_ran_out": (
            "{rows} 条时内存不足；现在一批最多 {batch_tokens} 个 token，继续进行",
            "memory ran out with {rows} rows; the batch is now at most {batch_tokens} tokens, and goes on",
        ),
        "memory_is_back": (
            "内存又够用了；现在一批最多又是 {batch_tokens} 个 token",
            "memory suffices again; the batch is at most {batch_tokens} tokens as before",
        ),
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
        "wrote_answers": ("{count} 个回答已写入 {file}", "Wrote {count} answers to {file}"),
        # compare
        "verdict": ("结论", "verdict"),
        "interval_head": ("B - A 的 95 % 区间", "95 % of B - A"),
        "more than noise": ("超出偶然", "more than noise"),
        "not more than noise": ("可能只是偶然", "not more than noise"),
        "too few rows": ("条数太少", "too few rows"),
        "is_better": ("：{run} 更好", ": {run} is better"),
        "one_row": ("1 条", "1 row"),
        "several_rows": ("{count} 条", "{count} rows"),
        "too_few_to_tell": (
            "只有 {rows}，看不出是不是偶然：请至少评估 {least} 条，最好几百条。",
            "Nothing can be said about noise with {rows}: evaluate at least {least}, better some hundred.",
        ),
        "about_bootstrap": (
            "配对自助法，对各条重采样 {resamples:,} 次。有 {metrics} 个指标时，可能有一个碰巧显得突出\n"
            "（两个同样好的模型相比，每个指标约 20 次里有 1 次），所以请事先决定看哪一个。区间只包含\n"
            "选取哪些条带来的差异：换训练种子或用采样生成回答，差异会更大。",
            "Paired bootstrap, {resamples:,} resamples of the rows. With {metrics} metrics one may stand out by chance\n"
            "(each does in about 1 of 20 comparisons of equal models), so decide beforehand which one counts. Only the\n"
            "choice of rows is in the interval: another training seed, or sampled answers, vary beyond it.",
        ),
        # export
        "wrote_format": ("已写入 {folder}，{format} 格式", "Wrote {folder} in {format} format"),
        "wrote_quantised": (
            "已写入 {folder}，官方 int{bits} 格式，{size:.2f} GB",
            "Wrote {folder} in the official int{bits} format, {size:.2f} GB",
        ),
        "merged_shards": (
            "已写入 {folder}，{size:.2f} GB；用到文字时把 tokenizer 文件复制进去",
            "Wrote {folder}, {size:.2f} GB; for texts, copy the tokenizer's file into it",
        ),
        "divided_again": (
            "已写入 {folder}，官方格式，分为 {shards} 份，共 {size:.2f} GB",
            "Wrote {folder} in the official format, {shards} parts, {size:.2f} GB together",
        ),
        "converted": (
            "已写入 {folder}。续训：--resume_from_checkpoint {checkpoint}，有效批量不变",
            "Wrote {folder}. Resume with --resume_from_checkpoint {checkpoint} and the same effective batch",
        ),
    }
)


def note(text: object) -> str:
    """A line that nothing depends on, but that should be read."""
    return message("note", text=text)


def silent(*_: object) -> None:
    """Stands for print where nothing is said: on all but the first process, beside JSON."""
