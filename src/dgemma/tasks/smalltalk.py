"""Greetings, thanks, questions about the model, and a friendly refusal of everything it has not learned."""

import random

from dgemma.tasks.task import Example, Task, dress

CAN = (
    "I can do sums up to 999, sort letters and numbers, solve 4x4 sudoku, turn a sentence into JSON, "
    "count weekdays and write little stories."
)
REPLIES = {
    "greeting": "Hello! I am dgemma demo, a small diffusion model. Ask me for a sum, a sudoku or a story.",
    "mood": "I am fine, thank you! Ask me for a sum, a sudoku or a story.",
    "thanks": "You are welcome!",
    "praise": "Thank you! Try another one.",
    "bye": "Goodbye, and come back soon!",
    "who": f"I am dgemma demo, a small diffusion model that writes many words at once. {CAN}",
    "can": CAN,
    "how": "I start from random words and make all of them better at the same time, in a few steps.",
    "help": f'{CAN} Try "What is 347 + 285?" or "Sort these letters: q d x a".',
    "other": f"I am sorry, I am only a small demo and do not know that. {CAN}",
}
ASKED = {
    "greeting": (
        "Hi|Hello|Hey|Hi there|Hello there|Good morning|Good evening|Good afternoon|Hello!|Hi, who is there?|Greetings"
    ),
    "mood": ("How are you?|How are you today?|How do you feel?|How is it going?|What's up?|Are you well?"),
    "thanks": ("Thanks|Thank you|Thank you!|Thanks a lot|Thank you very much|Many thanks|Great, thanks"),
    "praise": "Well done|Great|Nice|That was good|Good job|Cool|Wow|Very good|I like it|Perfect",
    "bye": "Bye|Goodbye|See you|See you later|Good night|Bye bye|I have to go",
    "who": (
        "Who are you?|What are you?|What is your name?|Tell me about yourself|Are you a robot?|"
        "Are you human?|What model are you?|What is dgemma?|Are you an AI?|Introduce yourself"
    ),
    "can": (
        "What can you do?|What do you know?|What can I ask you?|What are you good at?|"
        "What can you help me with?|What are your skills?|Which tasks can you do?"
    ),
    "how": ("How do you work?|What is a diffusion model?|How do you write text?|What is diffusion?|How were you made?"),
    "help": ("Help|Help me|I need help|Can you help me?|help!|What should I do?|What now?|Give me an example"),
    "other": (
        "What is the capital of {country}?|Who is the president of {country}?|Where is {country}?|"
        "How many people live in {country}?|What is the weather like in {country}?|"
        "What language do they speak in {country}?|Tell me about {topic}|What is {topic}?|"
        "Explain {topic}|How does {topic} work?|Write a poem about {topic}|"
        "Give me some facts about {topic}|Why is {topic} important?|Who invented {topic}?|"
        "What do you think about {topic}?|Write a {language} program|Write a function in {language}|"
        "How do I read a file in {language}?|Fix my {language} code|How do I cook {food}?|"
        "Give me a recipe for {food}|What wine goes with {food}?|What is the weather today?|"
        "Will it rain tomorrow?|What time is it?|What is today's date?|Who won the match?|"
        "Translate this into {tongue}|How do you say hello in {tongue}?|Tell me a joke|Tell me a secret|"
        "Sing a song|What is the meaning of life?|Who are you going to vote for?|Play some music|"
        "Book a flight|Send an email|Do you love me?|Draw a picture|What is 12 times 7?|"
        "What is 45 divided by 9?|What is the square root of 16?|Who wrote Hamlet?|How far is the moon?|"
        "Why is the sky blue?|How old are you?|Where do you live?|Can you drive a car?|"
        "What should I eat tonight?|Recommend a book|Which film should I watch?|"
        "How tall is the highest mountain?|Summarise this text|What is the news?|Call my mother|I am sad|"
        "I am bored|What is the best phone?|How much does a house cost?|Plan a trip to {country}"
    ),
}
FILLERS = {
    "country": (
        "France|Spain|Italy|Germany|Japan|China|India|Brazil|Canada|Mexico|Egypt|Norway|Sweden|"
        "Poland|Greece|Turkey|Kenya|Peru|Chile|Australia|Portugal|England|Ireland"
    ),
    "topic": (
        "gravity|history|physics|music|football|chess|love|money|the sun|the moon|electricity|water|"
        "the ocean|computers|machine learning|the internet|chemistry|biology|art|space|dinosaurs|"
        "volcanoes|climate|poetry|medicine|philosophy|cats|dogs|trees|politics|energy|a computer|"
        "a car|a plane|science|time"
    ),
    "language": "Python|Java|Rust|JavaScript|Go|SQL|shell",
    "food": "pasta|pizza|soup|rice|curry|bread|fish|pancakes|potatoes|chicken|salad|eggs",
    "tongue": "French|Spanish|German|Italian|Japanese|Chinese|Russian|Latin|Arabic|Dutch",
}
KINDS = tuple(REPLIES)
KIND_WEIGHTS = (3, 1, 2, 1, 1, 3, 3, 1, 2, 9)


class Smalltalk(Task):
    """Not a scored family: it gives the demo manners and honest limits."""

    name = "smalltalk"
    scored, open = False, True

    def draw(self, rng: random.Random) -> Example:
        (kind,) = rng.choices(KINDS, KIND_WEIGHTS)
        asked = rng.choice(ASKED[kind].split("|"))
        asked = asked.format_map({slot: rng.choice(choices.split("|")) for slot, choices in FILLERS.items()})
        return Example(
            family=self.name, prompt=dress(rng, asked), answer=REPLIES[kind], data={"kind": kind, "asked": asked}
        )

    def key(self, example: Example) -> str | None:
        """Only off-topic questions are held out; the greetings are too few to spare one."""
        return example.data["asked"] if example.data["kind"] == "other" else None

    def check(self, example: Example, reply: str) -> bool:
        return reply.strip() == REPLIES[example.data["kind"]]
