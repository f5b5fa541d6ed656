"""Files to be checked."""


def flat(text):
    return " ".join(text.split())


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


HEAVY = ("torch", "transformers", "datasets", "accelerate", "trl", "axolotl", "llamafactory")


GOOD = {"input_ids": [7, 8, 9, 5], "labels": [-100, -100, 9, 5]}


FAULTS = {
    "short labels": ({"labels": [-100, 9, 5]}, "labels has 3 entries for 4 input_ids"),
    "an id outside the vocabulary": ({"input_ids": [7, 8, 64, 5]}, "input_ids has 64 at position 2; the model"),
    "a negative id": ({"input_ids": [7, -8, 9, 5]}, "input_ids has -8 at position 1"),
    "a label outside the vocabulary": ({"labels": [-100, -100, 9, 2**40]}, "labels has 1099511627776 at position 3"),
    "a negative label": ({"labels": [-100, -1, 9, 5]}, "labels has -1 at position 1; the model knows 0 to 63, or -100"),
    "a short mask": ({"attention_mask": [1, 1]}, "attention_mask has 2 entries for 4 input_ids"),
}  # fmt: skip
