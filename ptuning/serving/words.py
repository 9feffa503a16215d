"""What `ptuning serve` and `ptuning chat` say in the terminal, in Chinese and English."""

from ptuning.language import Texts

words = Texts(
    {
        # serve
        "api": (
            "API    {address}   模型：{names}；没有指定模型的请求由 {default} 回答",
            "API    {address}   models: {names}; requests that name none get {default}",
        ),
        "page": ("网页   {address}", "Page   {address}"),
        "try": ("试一试 {command}", "Try    {command}"),
        # chat
        "help": (
            "/clear 忘掉对话，/prefix NAME|DIR|none 换 prefix，/exit 退出。",
            "/clear forgets the dialogue, /prefix NAME|DIR|none changes the prefix, /exit leaves.",
        ),
        "error": ("错误：{text}", "error: {text}"),
        "answers": ("由 {name} 回答；可用：{names}", "{name} answers; there are {names}"),
        "forgotten": (
            "（最早的 {turns} 轮放不下了，已忘掉）",
            "({turns} old turns no longer fit and are forgotten)",
        ),
    }
)
