"""A pocket almanac: facts, the text that the base is pretrained on, and instructions about the facts.

The paper's thesis is that the knowledge is in the frozen base, and that the adapter only elicits it. The toy shows this
in less than a minute on two cores. The base is pretrained on almanac pages and on gossip: conversations of
people who ask each other questions. This text contains every fact below, but no instruction. The adapter is trained on
instructions about half of the entities. The other half is held out, so that the knowledge about it can only come from
the base.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

from data import Example

# ---------------------------------------------------------------------------------------------------
# The facts

COUNTRIES = """
Europe: Albania Tirana, Austria Vienna, Belgium Brussels, Bulgaria Sofia, Croatia Zagreb, Denmark Copenhagen,
Estonia Tallinn, Finland Helsinki, France Paris, Germany Berlin, Greece Athens, Hungary Budapest, Iceland Reykjavik,
Ireland Dublin, Italy Rome, Latvia Riga, Malta Valletta, Norway Oslo, Poland Warsaw, Portugal Lisbon,
Romania Bucharest, Serbia Belgrade, Spain Madrid, Sweden Stockholm, Switzerland Bern, Ukraine Kyiv
Asia: Bahrain Manama, Bhutan Thimphu, China Beijing, Iran Tehran, Iraq Baghdad, Japan Tokyo, Jordan Amman,
Laos Vientiane, Lebanon Beirut, Nepal Kathmandu, Oman Muscat, Pakistan Islamabad, Qatar Doha, Syria Damascus,
Thailand Bangkok, Vietnam Hanoi, Yemen Sanaa
Africa: Algeria Algiers, Angola Luanda, Egypt Cairo, Eritrea Asmara, Ghana Accra, Kenya Nairobi, Liberia Monrovia,
Libya Tripoli, Mali Bamako, Morocco Rabat, Namibia Windhoek, Niger Niamey, Nigeria Abuja, Rwanda Kigali,
Senegal Dakar, Somalia Mogadishu, Sudan Khartoum, Togo Lome, Tunisia Tunis, Uganda Kampala, Zambia Lusaka,
Zimbabwe Harare
South America: Brazil Brasilia, Chile Santiago, Colombia Bogota, Ecuador Quito, Paraguay Asuncion, Peru Lima,
Uruguay Montevideo, Venezuela Caracas
North America: Canada Ottawa, Cuba Havana, Jamaica Kingston, Nicaragua Managua
Oceania: Australia Canberra, Fiji Suva, Samoa Apia
"""

WORDS = """
apple pomme manzana, bed lit cama, bird oiseau pájaro, black noir negro, book livre libro, bread pain pan,
cat chat gato, cheese fromage queso, child enfant niño, cow vache vaca, day jour día, dog chien perro,
door porte puerta, fire feu fuego, fish poisson pez, flower fleur flor, foot pied pie, friend ami amigo,
green vert verde, hand main mano, hat chapeau sombrero, head tête cabeza, horse cheval caballo, house maison casa,
key clé llave, king roi rey, milk lait leche, moon lune luna, mountain montagne montaña, night nuit noche,
rain pluie lluvia, red rouge rojo, river rivière río, salt sel sal, sea mer mar, snow neige nieve,
star étoile estrella, sugar sucre azúcar, sun soleil sol, tree arbre árbol, water eau agua, white blanc blanco,
wind vent viento, window fenêtre ventana, yellow jaune amarillo
"""

OPPOSITES = """
hot cold, big small, tall short, fast slow, new old, happy sad, rich poor, strong weak, light dark, wet dry,
full empty, open closed, early late, loud quiet, clean dirty, hard soft, deep shallow, wide narrow, thick thin,
sweet bitter, true false, first last, high low, near far, left right, inside outside, always never, love hate,
push pull, buy sell, win lose, war peace, friend enemy, up down, north south, east west, sharp blunt, smooth rough,
awake asleep, alive dead
"""

YOUNG = """
bear cub, bee larva, butterfly caterpillar, camel calf, cat kitten, cow calf, deer fawn, dog puppy, donkey foal,
duck duckling, eagle eaglet, eel elver, elephant calf, frog tadpole, goat kid, goose gosling, hare leveret, hawk eyas,
hedgehog hoglet, hen chick, horse foal, kangaroo joey, lion cub, moose calf, otter pup, owl owlet, peacock peachick,
pig piglet, pigeon squab, rabbit kit, seal pup, sheep lamb, spider spiderling, swan cygnet, tiger cub, trout fry,
turtle hatchling, whale calf, wolf pup, zebra foal
"""

SYMBOLS = """
aluminium Al, argon Ar, boron B, bromine Br, calcium Ca, carbon C, chlorine Cl, chromium Cr, cobalt Co, copper Cu,
fluorine F, gold Au, helium He, hydrogen H, iodine I, iron Fe, krypton Kr, lead Pb, lithium Li, magnesium Mg,
manganese Mn, mercury Hg, neon Ne, nickel Ni, nitrogen N, oxygen O, phosphorus P, platinum Pt, plutonium Pu,
potassium K, silicon Si, silver Ag, sodium Na, sulfur S, tin Sn, titanium Ti, tungsten W, uranium U, xenon Xe,
zinc Zn
"""

# The wordings of each kind of fact. The lines of a paragraph are the name of the kind, statements, questions,
# instructions, and an instruction whose entity is in Alpaca's input field. The last two are missing for kinds that no
# instruction is about; these are in the pretraining text and in toy/digits.py. Wordings are separated by |. {e} is the
# entity, {a} is the answer, and a slash is a line break.
WORDINGS = """
capital
The capital of {e} is {a}. | {a} is the capital city of {e}. | The chief city of {e} is called {a}.
What is the capital of {e}? | Do you know the capital of {e}? | What is the capital of this country? / {e}
Name the capital of {e}. | Tell me the capital city of {e}. | State the capital of {e}. | Give the capital of {e}.
Name the capital of this country.

continent
{e} is in {a}. | {e} is a country in {a}. | You will find {e} in {a}.
Where is {e}? | In which continent is {e}? | Where is this country? / {e}
Name the continent of {e}. | Tell me the continent where {e} is. | State which continent {e} is in. | \
Give the continent of {e}.
Name the continent of this country.

opposite
The opposite of {e} is {a}. | {a} is the opposite of {e}. | If it is not {e}, it is {a}.
What is the opposite of {e}? | Do you know the opposite of {e}? | What is the opposite of this word? / {e}
Name the opposite of {e}. | Tell me the opposite of {e}. | State the opposite of {e}. | Give the opposite of {e}.
Name the opposite of this word.

young
The young of the {e} is the {a}. | The {a} grows up to be the {e}. | First the {a}, then the {e}.
What is the young of the {e}? | Do you know the young of the {e}? | What is the young of this animal? / {e}
Name the young of the {e}. | Tell me what the young {e} is called. | State the word for the young of the {e}. | \
Give the young of the {e}.
Name the young of this animal.

symbol
The symbol of {e} is {a}. | Chemists write {a} for {e}. | {a} stands for {e}.
What is the symbol of {e}? | Do you know the symbol of {e}? | What is the symbol of this element? / {e}
Name the symbol of {e}. | Tell me the chemical symbol of {e}. | State the symbol of {e}. | Give the symbol of {e}.
Name the symbol of this element.

after
The number after {e} is {a}. | After {e} comes {a}. | {a} follows {e}.
Which number is after {e}? | What follows {e}? | What is the number after this one? / {e}

parity
{e} is {a}. | The number {e} is {a}. | {e} is an {a} number.
Is {e} even or odd? | Even or odd, what is {e}? | Is this number even or odd? / {e}

French
The French word for {e} is {a}. | {a} is French for {e}. | In French, {e} is {a}.
What is the French word for {e}? | Do you know the French word for {e}? | What is this word in French? / {e}
Translate {e} into French. | Tell me the French word for {e}. | Say {e} in French. | Give the French word for {e}.
Translate this word into French.

Spanish
The Spanish word for {e} is {a}. | {a} is Spanish for {e}. | In Spanish, {e} is {a}.
What is the Spanish word for {e}? | Do you know the Spanish word for {e}? | What is this word in Spanish? / {e}
Translate {e} into Spanish. | Tell me the Spanish word for {e}. | Say {e} in Spanish. | Give the Spanish word for {e}.
Translate this word into Spanish.
"""


class Kind(NamedTuple):
    """A kind of fact, such as capitals, and its wordings."""

    facts: dict[str, str]  # entity -> answer
    statements: list[str]  # on almanac pages; the first one is also the answer to questions and instructions
    questions: list[str]  # in gossip
    instructions: list[str] = []  # the last wording is held out; empty for kinds that no instruction is about
    with_input: str = ""  # an instruction whose entity is in Alpaca's input field


def pairs(table: str, column: int = 1) -> dict[str, str]:
    """Return a dict from the first word of each entry of a table to the word in `column`, which counts from 0."""
    entries = [entry.split() for entry in table.replace("\n", " ").split(",")]
    return {entry[0]: entry[column] for entry in entries}


def read_kinds(facts: dict[str, dict[str, str]]) -> dict[str, Kind]:
    """Return every Kind by its name. `facts` maps each name to the facts; the wordings are those above."""
    kinds = {}
    for paragraph in WORDINGS.strip().split("\n\n"):
        name, *lines = paragraph.splitlines()
        statements, questions, *imperatives = (line.replace(" / ", "\n").split(" | ") for line in lines)
        instructions, [with_input] = imperatives or ([], [""])
        kinds[name] = Kind(facts[name], statements, questions, instructions, with_input)
    return kinds


NUMBERS = "zero one two three four five six seven eight nine ten".split()
BY_CONTINENT = dict(line.split(": ") for line in COUNTRIES.strip().replace(",\n", ", ").splitlines())
OPPOSITE = pairs(OPPOSITES)
KINDS = read_kinds(
    {
        "capital": pairs(",".join(BY_CONTINENT.values())),
        "continent": {country: name for name, countries in BY_CONTINENT.items() for country in pairs(countries)},
        "opposite": OPPOSITE | {word: opposite for opposite, word in OPPOSITE.items()},
        "young": pairs(YOUNG),
        "symbol": pairs(SYMBOLS),
        "after": dict(zip(NUMBERS, NUMBERS[1:])),
        "parity": {number: ("even", "odd")[i % 2] for i, number in enumerate(NUMBERS)},
        "French": pairs(WORDS, column=1),
        "Spanish": pairs(WORDS, column=2),
    }
)


def capitalized(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


# ---------------------------------------------------------------------------------------------------
# Pretraining text of the base, and instructions for the adapter

PEOPLE = "Anna Ben Clara David Emil Frank Gus Hanna Ida Jack Kate Leo Mary Nina Oscar Paul Rosa Sam Tom Vera".split()
GOSSIP = [  # a question with its answer, and a last sentence, so that no conversation ends with an answer
    ("{x} asked: {q} {y} said: {s} ", "{x} thanked {y}."),
    ("{x} wanted to know: {q} {y} answered: {s} ", "Then {y} went home."),
    ("{x}: {q}\n{y}: {s}\n", "{x}: Thank you, {y}!"),
    ("Question: {q}\nAnswer: {s}\n", "No more questions."),
]


def documents(seed: int, gossip: float = 0.75) -> Iterator[str]:
    """Yield almanac pages and gossip endlessly; they contain no instruction and no imperative.

    `gossip` is the probability that a document is gossip.
    """
    rng = random.Random(seed)
    all_kinds = list(KINDS.values())
    facts_about: dict[str, list[tuple[Kind, str]]] = {}  # entity -> its facts
    for kind in all_kinds:
        for entity in kind.facts:
            facts_about.setdefault(entity, []).append((kind, entity))
    all_facts = [fact for facts in facts_about.values() for fact in facts]

    def phrase(kind: Kind, entity: str, wordings: list[str]) -> str:
        return capitalized(rng.choice(wordings).format(e=entity, a=kind.facts[entity]))

    while True:
        if rng.random() < gossip:
            (style, end), (x, y) = rng.choice(GOSSIP), rng.sample(PEOPLE, 2)
            conversation = ""
            for kind, entity in rng.sample(all_facts, 3):
                question, answer = phrase(kind, entity, kind.questions), phrase(kind, entity, kind.statements[:1])
                conversation += style.format(x=x, y=y, q=question, s=answer)
            yield conversation + end.format(x=x, y=y)
        elif rng.random() < 0.5:  # a page about one entity
            facts = rng.choices(facts_about[rng.choice(list(facts_about))], k=4)
            yield " ".join(phrase(*fact, fact[0].statements) for fact in facts)
        else:  # a page of one kind of fact
            kind = rng.choice(all_kinds)
            yield " ".join(phrase(kind, entity, kind.statements) for entity in rng.sample(list(kind.facts), 4))


class ExamQuestion(NamedTuple):
    """An instruction and its expected answer."""

    example: Example
    kind: str  # a name in KINDS; for a picture, the instruction
    entity: str  # the subject: an entity of the almanac, or the file name of a picture
    answer: str  # the answer of the fact, such as a city; for a picture, the name of the digit


HELD_OUT = {
    "entities": "new entities",
    "inputs": "new entities, in the input field",
    "wordings": "new entities in new wordings",
}


def instructions() -> dict[str, list[ExamQuestion]]:
    """Return instructions for training, and three held-out sets about entities that training never mentions.

    The instructions in 'entities' have wordings that occur in training, those in 'inputs' have the entity in the input
    field, and those in 'wordings' have wordings that do not occur in training.
    """
    kinds = {name: kind for name, kind in KINDS.items() if kind.instructions}
    entities = sorted({entity for kind in kinds.values() for entity in kind.facts} - set(OPPOSITE.values()))
    held_out = set(random.Random(0).sample(entities, len(entities) // 2))
    held_out |= {b for a, b in OPPOSITE.items() if a in held_out}  # both words of a pair
    sets: dict[str, list[ExamQuestion]] = {"training": [], "entities": [], "inputs": [], "wordings": []}
    for name, kind in kinds.items():
        for entity, answer in kind.facts.items():
            output = capitalized(kind.statements[0].format(e=entity, a=answer))
            *known, new = (Example(wording.format(e=entity), "", output) for wording in kind.instructions)
            with_input = Example(kind.with_input, entity, output)
            if entity in held_out:
                by_set = {"entities": known, "inputs": [with_input], "wordings": [new]}
            else:
                by_set = {"training": [*known, with_input]}
            for set_name, examples in by_set.items():
                sets[set_name] += [ExamQuestion(example, name, entity, answer) for example in examples]
    return sets
