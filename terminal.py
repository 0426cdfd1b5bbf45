"""The chat of generate.py in a terminal."""
import json
import sys

from utils import BadInput, Chat


def chat_in_terminal(model, chat: Chat, start: list[dict], settings: dict) -> None:
    """A conversation with history, until the end of the input (Ctrl-D)."""
    import readline  # noqa: F401  (lets input() edit Chinese characters)

    import generate

    print("/clear forgets the conversation, /undo the last round, /system TEXT sets the system text, /save FILE keeps the\n"
          "conversation as a training record; Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    messages = list(start)
    while True:
        try:
            text = input("\nUser: ").strip()
        except EOFError:
            return print()
        command, _, argument = text.partition(" ")
        if command == "/clear":
            messages = messages[: bool(messages) and messages[0]["role"] == "system"]
        elif command == "/undo":
            last = max([i for i, message in enumerate(messages) if message["role"] == "user"], default=len(messages))
            del messages[last:]
        elif command == "/system":
            messages = ([{"role": "system", "content": argument}] if argument else []) + [m for m in messages if m["role"] != "system"]
        elif command == "/save" and argument:
            with open(argument, "a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            print(f"[saved to {argument}]", file=sys.stderr)
        elif command.startswith("/") and command in ("/save", "/help", "/exit", "/quit"):
            print("[/clear, /undo, /system TEXT, /save FILE, Ctrl-D]", file=sys.stderr)
        elif text:
            try:
                asked = generate.fit(model, chat, messages + [{"role": "user", "content": text}], settings["max_new_tokens"])
            except BadInput as problem:
                print(f"[{problem}]", file=sys.stderr)
                continue
            print("Assistant: ", end="", flush=True)
            answer = ""
            try:
                for piece in generate.stream(model, chat, asked, **settings):
                    answer += piece
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                print(" [stopped]", end="")
            print()
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
