"""Questions for end-to-end tests, in the phrasings that the README shows. Deterministic."""


def questions(count: int) -> list[str]:
    """``count`` different questions, sums and Countdown games alternating."""
    asked: list[str] = []
    for n in range((count + 1) // 2):
        a, b, c = 2 + n % 7, 3 + n % 17, 1 + n % 23
        asked += [f"{11 + n % 80}*{12 + n * 7 % 80}+{n % 90}", f"make {a * b + c} from {a}, {b}, {c}"]
    return asked[:count]
