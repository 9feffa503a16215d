"""A client in the style that is deployed: one POST, JSON there and back. Asks the servers of both models in turn, those that run.

python scripts/request_example.py [question] [--url http://127.0.0.1:7030/chatglm] [--model NAME] [--key KEY]
"""

import argparse
import sys

import requests

SERVERS = {"ChatGLM2": "http://127.0.0.1:7030/chatglm", "Baichuan": "http://127.0.0.1:7010/baichuan"}


class NoServer(Exception):
    """Nobody listens there."""


def ask(url: str, question: str, history: list, model: str = "", key: str = "") -> dict:
    """One question; the answer has the history to send with the next one."""
    body = {"prompt": question, "history": history, "max_length": "", "top_p": "", "temperature": ""}
    if model:
        body["model"] = model
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = requests.post(url, json=body, headers=headers, timeout=300).json()
    except requests.ConnectionError:
        raise NoServer(
            f"no server answers at {url}; start one with bash scripts/serve.sh --model DIR, or give --url"
        ) from None
    except requests.RequestException as error:
        raise SystemExit(f"error: {url}: {error}") from None
    if answer.get("status") != 200:
        problem = answer.get("error")
        text = problem["message"] if isinstance(problem, dict) else problem  # another path of the server's
        raise SystemExit(f"{answer.get('status', 'error')}: {text}")
    return answer


def talk(url: str, args: argparse.Namespace, name: str = "") -> None:
    """A question and one more on the same history."""
    head = f"{name}: " if name else ""
    first = ask(url, args.question, [], args.model, args.key)
    print(head + first["response"])
    second = ask(url, "请再说一遍", first["history"], args.model, args.key)
    print(head + second["response"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", default="你好")
    parser.add_argument("--url", help=f"of one server; default: {' and '.join(SERVERS.values())}")
    parser.add_argument("--model", default="", help="a prefix's name, or base")
    parser.add_argument("--key", default="")
    args = parser.parse_args()
    missing = []
    for name, url in {"": args.url}.items() if args.url else SERVERS.items():
        try:
            talk(url, args, name)
        except NoServer as error:
            missing.append(str(error))
    for text in missing:
        print(f"{'error' if args.url else 'left out'}: {text}", file=sys.stderr)
    if len(missing) == (1 if args.url else len(SERVERS)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
