"""What `ptuning validate-data` says of files, in Chinese and English. Problems of rows are errors, and English."""

from ptuning.language import Texts

words = Texts(
    {
        # a file
        "file": ("{file}：{rows}{bad}{format}", "{file}: {rows}{bad}{format}"),
        "one_row": ("1 条", "1 row"),
        "rows": ("{count:,} 条", "{count:,} rows"),
        "one_problem": ("1 个问题", "1 problem"),
        "problems": ("{count:,} 个问题", "{count:,} problems"),
        "bad": ("，其中 {rows}有 {problems}", ", {problems} in {rows}"),
        "format": ("（{format}）", " ({format})"),
        "until_the_fault": (
            "  以下统计只包括出错之前的各条",
            "  the figures are those of the rows before the fault",
        ),
        "turns": ("  轮次：{turns}{more}{systems}", "  turns: {turns}{more}{systems}"),
        "rows_of_turns": ("{turns} 轮 {rows}", "{turns} in {rows}"),
        "turns_comma": ("，", ", "),
        "more_turns": ("，最多 {turns} 轮", ", up to {turns}"),
        "systems": ("；{rows}有系统提示", "; a system text in {rows}"),
        # lengths
        "tokens": ("token 数", "tokens"),
        "median": ("中位", "median"),
        "longest": ("最长", "longest"),
        "prompts": ("问题", "prompts"),
        "answers": ("回答", "answers"),
        "lengths": (
            "  {what}{figures}（{place}）；{flag} {limit} 截断 {cut:,} 条{share}",
            "  {what}{figures} ({place}); {cut:,} cut{share} at {flag} {limit}",
        ),
        "share": ("（{share}）", " ({share})"),
        # where
        "line": ("第 {number} 行", "line {number}"),
        "row": ("第 {number} 条", "row {number}"),
        "several_line": ("第 {numbers} 行", "lines {numbers}"),
        "several_row": ("第 {numbers} 条", "rows {numbers}"),
        "and_more": ("{shown} 等，另有 {count:,} 处", "{shown} and {count:,} more"),
        # notes
        "one_repeat": ("1 条与前面的一条相同：{pairs}", "1 row repeats an earlier row: {pairs}"),
        "repeats": ("{count:,} 条与前面的一条相同：{pairs}", "{count:,} rows repeat an earlier row: {pairs}"),
        "odd": ("{rows}：{meaning}：{places}", "{rows}: {meaning}: {places}"),
        "frequent": (
            "{count:,} 条的回答相同，最早在{place}",
            "{count:,} rows have the same answer, the first at {place}",
        ),
        "overlap": (
            "{other} 的 {rows:,} 个问题中有 {questions:,} 个也在 {one} 中，其中 {same:,} 个连回答也相同：{examples}；"
            "它们的得分只说明记住了多少：请从其中一个文件里去掉",
            "{questions:,} of {rows:,} questions of {other} also stand in {one}, {same:,} with the same answer: {examples}; "
            "scores on them measure memory: take them out of one file",
        ),
        "no_lengths": (
            "没有统计 token 长度；需要时请给出 --model_name_or_path",
            "no token lengths; for them give --model_name_or_path",
        ),
        # what a row that looks wrong shows (ptuning.validation.lint)
        "echo": ("回答就是问题本身", "the answer is the question again"),
        "control_text": (
            "文字里有控制 token 或模板自己的用语（[gMASK]、</s>、[Round 1] 等），模型会学着写出它们",
            "control tokens or the template's own words stand in the text ([gMASK], </s>, [Round 1], …), and the model learns "
            "to write them",
        ),
        "damaged_text": (
            "损坏的字符（U+FFFD、{example}），由错误的编码转换留下",
            "damaged characters (U+FFFD, {example}), left from a wrong conversion of the encoding",
        ),
        "html": ("HTML 标签或实体", "HTML tags or entities"),
        "very_long": (
            "超过 {limit} 个 token，比模型训练时的长度还长",
            "more than {limit} tokens, which is longer than what the model was trained with",
        ),
        # what to do
        "suggested": (
            "建议：--max_source_length {source} --max_target_length {target}（截断的问题：{prompts}，回答：{answers}）",
            "suggested: --max_source_length {source} --max_target_length {target} (cuts {prompts} of the prompts and {answers} "
            "of the answers)",
        ),
        "none": ("无", "none"),
        "under": ("不到 0.1%", "under 0.1%"),
        "wrote": ("已写入 {path}：{rows:,} 条", "Wrote {path}: {rows:,} rows"),
        "wrote_left_out": ("已写入 {path}：未收入的 {rows:,} 条", "Wrote {path}: {rows:,} rows that were left out"),
    }
)
