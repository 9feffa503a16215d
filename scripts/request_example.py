"""A client in the style that is deployed: one POST, JSON there and back.

python scripts/request_example.py [question] [--url http://127.0.0.1:7030/chatglm] [--model NAME] [--key KEY]
"""

import argparse

import requests


def ask(url: str, question: str, history: list, model: str = "", key: str = "") -> dict:
    """One question; the answer has the history to send with the next one."""
    body = {"prompt": question, "history": history, "max_length": "", "top_p": "", "temperature": ""}
    if model:
        body["model"] = model
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = requests.post(url, json=body, headers=headers, timeout=300).json()
    except requests.ConnectionError:
        raise SystemExit(
            f"error: no server answers at {url}; start one with bash scripts/serve.sh, or give --url"
        ) from None
    except requests.RequestException as error:
        raise SystemExit(f"error: {url}: {error}") from None
    if answer["status"] != 200:
        raise SystemExit(f"{answer['status']}: {answer['error']}")
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", default="你好")
    parser.add_argument("--url", default="http://127.0.0.1:7030/chatglm")
    parser.add_argument("--model", default="", help="a prefix's name, or base")
    parser.add_argument("--key", default="")
    args = parser.parse_args()
    first = ask(args.url, args.question, [], args.model, args.key)
    print(first["response"])
    second = ask(args.url, "请再说一遍", first["history"], args.model, args.key)
    print(second["response"])


if __name__ == "__main__":
    main()
