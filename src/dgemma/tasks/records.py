"""A sentence about a person -> a JSON record with name, age, city and job; what is not said is null."""

import json
import random

from dgemma.tasks.task import Example, Task, dress, words

NAMES = words(
    "Mara Anna Ben Carla David Elena Felix Grace Hugo Irene Jonas Karen Leo Maria Nina Oscar Paula Quinn "
    "Rosa Simon Tara Uma Victor Wendy Xavier Yara Zoe Adam Bella Chloe Daniel Emma Frank Gloria Henry "
    "Ivan Julia Kevin Laura Marco Nora Omar Peter Rachel Samuel Tina Ursula Vera Walter Yusuf Alice Boris "
    "Clara Diego Edith Fatima George Hannah Isaac Jack"
)
CITIES = words(
    "Lisbon Paris Berlin Madrid Rome Vienna Prague Warsaw Dublin London Oslo Stockholm Helsinki "
    "Copenhagen Athens Budapest Brussels Amsterdam Zurich Geneva Milan Naples Porto Seville Barcelona "
    "Munich Hamburg Cologne Krakow Riga Tokyo Osaka Seoul Delhi Mumbai Cairo Nairobi Lagos Accra Toronto "
    "Montreal Boston Chicago Denver Seattle Austin Lima Bogota Santiago Sydney"
)
JOBS = words(
    "baker teacher nurse doctor pilot farmer painter writer singer dancer lawyer plumber carpenter "
    "gardener driver chef waiter librarian dentist engineer architect actor artist electrician accountant "
    "tailor butcher florist barber sailor soldier mechanic welder judge cleaner photographer programmer "
    "scientist translator designer"
)
YOUNGEST, OLDEST = 18, 90
FIELDS = ("name", "age", "city", "job")

REQUESTS = ("Make JSON of this:", "Turn this into JSON:", "JSON:", "Convert to JSON:", "Write this as JSON:")
SENTENCES = (
    "{name} is {an_age} {age}-year-old {job} from {city}.",
    "{name} is {age} years old, lives in {city} and works as {a_job} {job}.",
    "{name}, {age}, is {a_job} {job} in {city}.",
    "My name is {name}, I am {age}, I live in {city} and I am {a_job} {job}.",
    "The {job} {name} from {city} is {age} years old.",
    "In {city} lives {name}, {an_age} {age}-year-old {job}.",
    "{name} works in {city} as {a_job} {job} and is {age}.",
    # One field is not said.
    "{name} is {a_job} {job} from {city}.",
    "{name} is {age} years old and lives in {city}.",
    "{name} is {an_age} {age}-year-old {job}.",
    "{an_age_capital} {age}-year-old {job} lives in {city}.",
)


def article(word: str) -> str:
    """`a` or `an`, for the words and ages used here."""
    return "an" if word[0] in "aeiou8" or word == "18" else "a"


class Records(Task):
    """Field extraction."""

    name = "records"

    def draw(self, rng: random.Random) -> Example:
        sentence = rng.choice(SENTENCES)
        name, city, job = rng.choice(NAMES), rng.choice(CITIES), rng.choice(JOBS)
        age = rng.randint(YOUNGEST, OLDEST)
        an_age = article(str(age))
        text = sentence.format(
            name=name,
            age=age,
            city=city,
            job=job,
            a_job=article(job),
            an_age=an_age,
            an_age_capital=an_age.capitalize(),
        )
        values = {"name": name, "age": age, "city": city, "job": job}
        record = {key: values[key] if f"{{{key}}}" in sentence else None for key in FIELDS}
        prompt = f"{dress(rng, rng.choice(REQUESTS))} {text}"
        return Example(family=self.name, prompt=prompt, answer=json.dumps(record), data={"record": record})

    def key(self, example: Example) -> str:
        return json.dumps(example.data["record"], sort_keys=True)

    def check(self, example: Example, reply: str) -> bool:
        """The reply is JSON and equals the record, types included; the order of the fields is free."""
        try:
            found = json.loads(reply)
        except (ValueError, RecursionError):
            return False
        return json.dumps(found, sort_keys=True) == self.key(example)
