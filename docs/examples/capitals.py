"""Write two tasks for lm-evaluation-harness, made from the toy's almanac: python docs/examples/capitals.py

Both contain the held-out questions about capitals, except those with the country in the input field. In
capitals_chosen.yaml, the model chooses one of four cities; in capitals_written.yaml, it writes the answer. All files
are written to the current folder.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from toy.almanac import instructions

SHARED = "dataset_path: json\ndataset_kwargs: {data_files: {test: capitals.jsonl}}\ntest_split: test\n"
CHOSEN = """task: capitals_chosen
output_type: multiple_choice
doc_to_text: question
doc_to_choice: options
doc_to_target: right
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITTEN = """task: capitals_written
output_type: generate_until
doc_to_text: question
doc_to_target: "{{options[right]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 40}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""

held_out = [question for name, questions in instructions().items() if name != "training" for question in questions]
capitals = [question for question in held_out if question.kind == "capital" and not question.example.input]
cities = sorted({question.answer for question in capitals})
random.seed(0)
lines = []
for question in capitals:
    others = random.sample([city for city in cities if city != question.answer], 3)
    options = [question.example.output.replace(question.answer, city) for city in (question.answer, *others)]
    random.shuffle(options)
    right = options.index(question.example.output)
    lines.append(json.dumps({"question": question.example.instruction, "options": options, "right": right}) + "\n")
Path("capitals.jsonl").write_text("".join(lines))
for name, task in {"chosen": CHOSEN, "written": WRITTEN}.items():
    Path(f"capitals_{name}.yaml").write_text(SHARED + task)
