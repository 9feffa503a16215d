"""Every text of the page, in Chinese and English."""

import re

LANGUAGES = {"zh": "中文", "en": "English"}

# name: (Chinese, English)
_TABLE = {
    "title": ("与模型对话", "Chat with the model"),
    "welcome": (
        "在下方输入问题。左侧可选模型、改采样参数，或让两个模型回答同一个问题。",
        "Type a question below. On the left: choose a model, change the sampling, or let two models answer it.",
    ),
    "model": ("模型", "Model"),
    "model_b": ("对比模型", "Compared with"),
    "compare": ("并排对比两个模型", "Two models side by side"),
    "compare_help": (
        "同一个问题同时发给两个模型；之前的回答若只有左侧有，右侧也以它为历史。",
        "One question goes to both. Where only the left one answered before, that answer is the history of both.",
    ),
    "sampling": ("采样", "Sampling"),
    "temperature": ("温度（0 为贪心）", "Temperature (0 is greedy)"),
    "top_p": ("Top-p", "Top-p"),
    "max_tokens": ("最多生成 token 数", "Longest answer (tokens)"),
    "seed": ("随机种子", "Seed"),
    "seed_empty": ("空：每次不同", "empty: random"),
    "more": ("更多", "More"),
    "frequency_penalty": ("频率惩罚", "Frequency penalty"),
    "presence_penalty": ("存在惩罚", "Presence penalty"),
    "system": ("系统提示", "System prompt"),
    "system_help": (
        "放在整段对话之前的文字。要用它训练，请把它加上两个换行作为 --source_prefix。",
        "Text in front of the whole dialogue. To train with it, pass it and two line feeds as --source_prefix.",
    ),
    "markdown": ("按 Markdown 显示回答", "Show answers as Markdown"),
    "markdown_help": (
        "关闭时，回答与模型输出的文字完全一致，包括 * 和 #。",
        "When off, answers look exactly as the model wrote them, * and # included.",
    ),
    "history": ("对话记录", "Conversation"),
    "clear": ("清空", "Clear"),
    "download_chat": ("下载对话（JSON）", "Download chat (JSON)"),
    "download_rows": ("下载训练数据（{rows} 条）", "Download training rows ({rows})"),
    "download_rows_b": ("下载对比模型的训练数据（{rows} 条）", "Download rows of the second model ({rows})"),
    "rows_help": (
        "JSON lines，用于 --prompt_column prompt --response_column response --history_column history。"
        "中断或截断的回答不包括在内，修改后即包括。",
        "JSON lines for --prompt_column prompt --response_column response --history_column history. Answers that were "
        "stopped or cut off are left out until you edit them.",
    ),
    "ask": ("输入问题，按回车发送", "Ask something, send with Enter"),
    "waiting": ("等待回答 · {seconds} 秒", "Waiting for the answer · {seconds} s"),
    "answering": ("正在回答 · {seconds} 秒", "Answering · {seconds} s"),
    "stop": ("停止", "Stop"),
    "edit": ("修改", "Edit"),
    "again": ("重新回答", "Answer again"),
    "delete": ("删除", "Delete"),
    "question": ("问题", "Question"),
    "answer_of": ("{model} 的回答", "Answer of {model}"),
    "save": ("保存", "Save"),
    "save_ask": ("保存并重新提问", "Save and ask again"),
    "save_help": (
        "“保存”只改文字；“保存并重新提问”删除此后的对话并重新生成回答。",
        "Save changes the texts only. Save and ask again drops what follows and asks anew.",
    ),
    "cancel": ("取消", "Cancel"),
    "empty_question": ("问题不能为空。", "The question is empty."),
    "stopped": ("已停止", "stopped"),
    "length": ("达到 token 数上限，未完", "cut at the token limit"),
    "cut_problem": ("未完", "incomplete"),
    "edited": ("已修改", "edited"),
    "no_answer": ("（没有回答）", "(no answer)"),
    "dropped": ("最早的 {turns} 轮太长，没有送给模型", "the oldest {turns} turns did not fit and were left out"),
    "reload": ("重新连接", "Connect again"),
    "no_models": ("API 没有任何模型。", "The API has no models."),
    "problem_unreachable": (
        "连不上 API：{url}。请先启动：bash scripts/serve.sh；API 在别处时设置环境变量 PTUNING_API。",
        "Can't reach the API at {url}. Start it with: bash scripts/serve.sh, or set PTUNING_API if it is elsewhere.",
    ),
    "problem_bad_url": (
        "PTUNING_API 的值 {url} 不是网址，应如 http://127.0.0.1:7030。",
        "PTUNING_API is {url}, which is no address; write it like http://127.0.0.1:7030.",
    ),
    "problem_not_the_api": (
        "{url} 有回应，但不是这个 API。请检查 PTUNING_API 的地址和端口。",
        "Something answers at {url}, but it is not this API. Check the address and the port in PTUNING_API.",
    ),
    "problem_key_missing": (
        "API 需要密钥。启动页面前请设置环境变量 PTUNING_API_KEY。{detail}",
        "The API wants a key. Set PTUNING_API_KEY before starting the page. {detail}",
    ),
    "problem_key_wrong": (
        "API 不接受这个密钥。请检查环境变量 PTUNING_API_KEY。{detail}",
        "The API refuses the key. Check PTUNING_API_KEY. {detail}",
    ),
    "problem_unknown": (
        "没有这个模型，可能刚被移除。请在左侧另选一个。{detail}",
        "There is no such model; it may have been removed just now. Choose another on the left. {detail}",
    ),
    "problem_busy": (
        "服务器正忙，请 {seconds} 秒后重试。{detail}",
        "The server is busy. Try again in {seconds} seconds. {detail}",
    ),
    "problem_busy_soon": ("服务器正忙，请稍后重试。{detail}", "The server is busy. Try again soon. {detail}"),
    "problem_refused": (
        "服务器拒绝了请求（{status}）：{detail}",
        "The server refused the request ({status}): {detail}",
    ),
    "problem_down": (
        "服务器不能回答（{status}）：{detail} 请看服务器的日志。",
        "The server can't answer ({status}): {detail} See the server's log.",
    ),
    "problem_too_long": (
        "回答超过了服务器的时间限制。请减少 token 数后重试。{detail}",
        "The answer took longer than the server allows. Try again with fewer tokens. {detail}",
    ),
    "problem_server": (
        "服务器出错：{detail} 请看服务器的日志。",
        "The server failed: {detail} See the server's log.",
    ),
    "problem_timeout": (
        "API {url} 太久没有回应。请检查服务器是否还在运行。",
        "No sign of the API at {url} for too long. Check that the server still runs.",
    ),
    "problem_cut": (
        "回答没有完成，连接就断开了。请重试；若再次发生，请看服务器的日志。",
        "The connection ended before the answer did. Try again; if it happens again, see the server's log.",
    ),
    "problem_page": ("页面程序出错：{detail}", "A fault of this page: {detail}"),
}

TEXTS = {code: {name: pair[index] for name, pair in _TABLE.items()} for index, code in enumerate(LANGUAGES)}


def text(language: str, name: str, **fields: object) -> str:
    """A text of the page with its fields filled in."""
    return TEXTS[language][name].format(**fields).strip()


def problem_text(language: str, kind: str, fields: dict) -> str:
    """An ApiProblem in words."""
    return text(language, f"problem_{kind}", **fields)


def as_literal(body: str) -> str:
    """Markdown that shows a line as it is: stars, underlines, links, HTML, formulas and :emoji: mean nothing in it."""
    return re.sub(r"([\\`*_\[\]<>$:~|!&^#])", r"\\\1", body)


def as_safe_markdown(body: str) -> str:
    """A model's Markdown, without images: a browser fetches them from wherever the text says."""
    return body.replace("![", "\\![")
