"""Takes question, choices and label out of a row's text, unless the row has them."""

import re


def process(dataset):
    def split(row):
        asked = row["messages"][0]["content"]
        question = re.search(r"question: (.*?)\n\nAnswer1:", asked, re.S)[1]
        listed = re.search(r"\n\n(Answer1:.*?)\n\nAnswer format", asked, re.S)[1]
        choices = [choice.strip() for choice in re.split(r"Answer\d+:", listed)[1:]]
        return {"question": question, "choices": choices, "label": int(row["answer"].removeprefix("answer")) - 1}

    return dataset if "choices" in dataset.column_names else dataset.map(split)
