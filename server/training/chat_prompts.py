"""What a model is asked when it makes its own training data: templates times subjects, many thousands of prompts.

Drafters learn how the model goes on, not what is true, so the questions matter less than that they are as varied as
what people ask: explanations, stories, lists, code, arithmetic, letters, edits, tables, follow-up questions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

Turns = list[dict[str, str]]


def _listed(text: str) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).split("; "))


SYSTEMS = (
    "You are a helpful assistant.",
    "You are a concise assistant. Answer in at most three sentences.",
    "You are a patient teacher who explains things step by step.",
    "You are an experienced programmer.",
    "You are a friendly travel guide.",
    "Answer as briefly as you can.",
    "You write in a warm and lively style.",
    "You are a careful editor.",
)

SUBJECTS = _listed(
    """
    rain; music; bread; the moon; oak trees; running; the printing press; computers; friendship; winter; cats; dogs;
    football; the ocean; painting; sleep; money; school; gardening; mathematics; photosynthesis; books; birds;
    electric cars; tea; coffee; health; time; honey bees; rivers; mountains; chess; telephones; bridges; stars;
    volcanoes; earthquakes; glaciers; the Roman Empire; ancient Egypt; the French Revolution; the industrial
    revolution; the Silk Road; Vikings; gravity; light; sound; magnetism; electricity; atoms; black holes; the solar
    system; evolution; DNA; bacteria; viruses; vaccines; the human heart; the brain; memory; language; grammar;
    poetry; theatre; film; photography; architecture; jazz; the violin; the piano; opera; dance; yoga; swimming;
    cycling; hiking; climbing; sailing; fishing; cooking pasta; cheese; chocolate; apples; rice; potatoes; spices;
    soup; breakfast; recycling; solar energy; wind power; nuclear energy; climate change; forests; deserts; coral
    reefs; whales; elephants; owls; wolves; spiders; butterflies; dinosaurs; fossils; maps; the calendar; clocks;
    the internet; email; search engines; artificial intelligence; machine learning; robots; databases; encryption;
    passwords; video games; social media; newspapers; libraries; museums; universities; teachers; doctors;
    firefighters; farmers; engineers; taxes; banks; insurance; saving money; starting a business; marketing;
    leadership; teamwork; time management; job interviews; public speaking; writing letters; learning a language;
    reading; stress; habits; happiness; courage; kindness; honesty; fear; loneliness; love; grandparents; children;
    marriage; birthdays; holidays; Paris; Tokyo; New York; Rome; Cairo; Istanbul; the Amazon; the Sahara; the Alps;
    Iceland; Australia; Antarctica; India; Brazil; airports; trains; bicycles; ships; aeroplanes; space travel;
    telescopes; microscopes; glass; paper; steel; plastic; cotton; leather; diamonds; salt; sugar; water; fire;
    wind; snow; thunderstorms; rainbows; the seasons; soil; seeds; roses; houseplants; democracy; laws; human
    rights; justice; elections; philosophy; Socrates; religion; myths; fairy tales; dragons; ghosts; pirates;
    detectives; a lighthouse; a lost key; an old clock; a small village; a haunted house; a robot that dreams; a
    talking cat; a forgotten letter; the last train; a magic garden; a brave mouse; the first day at school
    """
)

PEOPLE = _listed(
    """
    a child of six; a beginner; a student; my grandmother; a busy manager; a scientist; a tourist; a new colleague;
    someone who has never heard of it; a friend; an expert; a class of teenagers; my neighbour; a customer
    """
)

ABOUT = (
    "Explain {a} in simple words.",
    "Explain {a} to {p}.",
    "What is {a}?",
    "What is interesting about {a}?",
    "Why does {a} matter?",
    "Tell me about {a}.",
    "Tell me something surprising about {a}.",
    "Give me a short overview of {a}.",
    "Write a paragraph about {a}.",
    "Write three sentences about {a}.",
    "Describe {a} in one sentence.",
    "How would you describe {a} to {p}?",
    "What should {p} know about {a}?",
    "List five facts about {a}.",
    "List ten words that have to do with {a}.",
    "Give me three reasons to care about {a}.",
    "What are the main points to know about {a}?",
    "What are common misunderstandings about {a}?",
    "What are the pros and cons of {a}?",
    "How has {a} changed over time?",
    "What is the history of {a}?",
    "What will {a} be like in a hundred years?",
    "How do I learn more about {a}?",
    "Make a plan for a week of learning about {a}.",
    "Write a quiz of four questions about {a}, with answers.",
    "Write an introduction for an essay about {a}.",
    "Write an outline of an essay on {a}.",
    "Write a conclusion for an essay about {a}.",
    "Write a headline and a short news article about {a}.",
    "Write a product description that mentions {a}.",
    "Write a tweet about {a}.",
    "Write a blog post about {a}.",
    "Write a speech about {a} for {p}.",
    "Write a dialogue between two friends about {a}.",
    "Write an interview with an expert on {a}.",
    "Write an email to {p} about {a}.",
    "Write a letter of complaint about {a}.",
    "Write an invitation to a party about {a}.",
    "Write a thank-you note that mentions {a}.",
    "Write a diary entry about {a}.",
    "Write a short story about {a}.",
    "Write a story about {a} and {b}.",
    "Write the first paragraph of a novel about {a}.",
    "Write a story about {a} that ends well.",
    "Write a fable about {a} with a moral.",
    "Write a poem about {a}.",
    "Write a haiku about {a}.",
    "Write a song about {a} and {b}.",
    "Write a limerick about {a}.",
    "Tell me a joke about {a}.",
    "Make up a riddle about {a}.",
    "Give me advice on {a}.",
    "Give {p} some tips about {a}.",
    "What mistakes do people make with {a}?",
    "What questions should I ask about {a}?",
    "What do I need to get started with {a}?",
    "Give step-by-step instructions for something to do with {a}.",
    "What is the difference between {a} and {b}?",
    "Compare {a} and {b}.",
    "What do {a} and {b} have in common?",
    "Which is more important, {a} or {b}?",
    "How are {a} and {b} connected?",
    "Make a table that compares {a} and {b}.",
    "Make a markdown list about {a} with headings.",
    "Answer in JSON with the keys title, summary and tags: {a}.",
    "Give a definition of {a} and an example.",
    "Use {a} and {b} in a sentence.",
    "Give me five synonyms or related words for {a}.",
    "Translate this into French: I would like to know more about {a}.",
    "Translate this into Spanish: {p} asked me about {a}.",
    "Translate this into German: We talked about {a} and {b}.",
    "Is {a} good or bad? Explain your opinion.",
    "Argue for and against {a}.",
    "What would the world be like without {a}?",
    "What would you say to {p} who is afraid of {a}?",
    "I am bored with {a}. What else could I try?",
    "Can you recommend books about {a}?",
    "Who are famous people connected with {a}?",
    "Where can I see {a}?",
    "When did people first think about {a}?",
    "How does {a} work?",
    "How much does {a} cost?",
    "Summarize what is known about {a} in two sentences.",
    "Name three things that {a} and {b} are not.",
    "Plan a lesson about {a} for {p}.",
    "Plan a weekend trip that has to do with {a}.",
    "Plan a dinner whose theme is {a}.",
    "Suggest a gift for {p} who loves {a}.",
    "Suggest a name for a company that deals with {a}.",
    "hi! can you tell me about {a} please",
    "i need help with {a}",
    "{a}?",
    "Thanks! And what about {a}?",
    "Let us talk about {a}. You begin.",
    "Pretend that you are {p} and tell me about {a}.",
)

TASKS = _listed(
    """
    reverses a string; checks whether a number is prime; computes the factorial of a number; sorts a list of
    numbers; counts the words of a text; finds the largest number of a list; removes duplicates from a list; checks
    for a palindrome; computes Fibonacci numbers; reads a CSV file; writes a JSON file; merges two dictionaries;
    flattens a nested list; computes the average of a list; converts Celsius to Fahrenheit; counts vowels; finds the
    longest word; rolls a die; generates a password; draws a triangle of stars; adds two matrices; searches a sorted
    list; prints a multiplication table; computes the greatest common divisor; validates an email address; parses a
    date; downloads a web page; renames files; implements a stack; implements a queue; implements a linked list;
    implements a binary tree; groups words by length; computes the area of a circle; simulates a bank account; plays
    rock, paper, scissors; rotates a list; transposes a matrix; checks whether two words are anagrams; counts how
    often each letter occurs
    """
)

LANGUAGES = ("Python", "Python", "Python", "JavaScript", "Java", "C", "C++", "Go", "Rust", "SQL", "Bash", "TypeScript")

CODE = (
    "Write a {l} function that {t}.",
    "Write a {l} program that {t}.",
    "How do I write code in {l} that {t}?",
    "Write a class in {l} that {t}.",
    "Write a {l} function that {t}, with comments.",
    "Write a {l} function that {t}, and a test for it.",
    "Explain how a function that {t} works.",
    "Give me pseudocode for a program that {t}.",
    "What errors can happen in {l} code that {t}?",
)

NAMES = ("Anna", "Ben", "Maria", "Tom", "Sara", "Ali", "Lucy", "Peter", "Mei", "Omar", "Julia", "Sam")
THINGS = ("apples", "books", "coins", "marbles", "tickets", "pencils", "cookies", "stamps", "eggs", "flowers")

SUMS = (
    "What is {x} plus {y}?",
    "What is {x} times {y}?",
    "What is {x} minus {y}?",
    "What is {x} percent of {z}?",
    "{n} has {x} {o} and gives {y} of them to {m}. How many are left?",
    "{n} buys {x} {o} for {y} dollars each. How much does it cost?",
    "A train travels {x} miles in {y} hours. How fast is it?",
    "{n} has {x} {o}, and {m} has {y} more. How many do they have together?",
    "Solve for x: {x}x + {y} = {z}.",
    "Sort these numbers: {x}, {z}, {y}, {w}.",
    "Is {z} divisible by {y}? Show your work.",
    "Write the numbers from {y} to {x} in words.",
    "Convert {x} kilometres to miles.",
    "What is the average of {x}, {y} and {w}?",
    "Continue the sequence: {y}, {x}, ...",
)

PASSAGES = (
    "The old lighthouse had stood on the cliff for two hundred years. Every night its keeper climbed the stairs to "
    "light the lamp, and every morning he wrote in a book what ships had passed.",
    "Our team met on Monday to discuss the new schedule. We agreed that the report is due on Friday, that Anna will "
    "write the summary, and that Tom will check the numbers.",
    "Water expands when it freezes, which is why ice floats. Because of that, lakes freeze from the top down, and "
    "fish survive the winter in the water below.",
    "the meeting are moved to thursday becuase the room was not free, please tell you're colleagues about it",
    "Bees visit flowers to collect nectar and pollen. While they do so, they carry pollen from one flower to "
    "another, which allows the plants to make seeds.",
    "I bought this kettle two weeks ago, and it already leaks. The shop told me to write to you. I would like to "
    "have a new one, or my money back.",
    "In 1969, two astronauts landed on the moon and walked on its surface for about two and a half hours, while a "
    "third one stayed in orbit and waited for them.",
    "The city plans to close the main street to cars. Shop owners fear that they will lose customers, but many "
    "residents look forward to quiet evenings and clean air.",
    "Mix the flour with the salt, add the water and the yeast, and knead the dough for ten minutes. Let it rest for "
    "an hour, shape it, and bake it until the crust is brown.",
    "She opened the door slowly. The room was empty, but the candle on the table was still burning, and there were "
    "two cups beside it.",
    "Students who sleep well remember more. In a study, those who slept for eight hours recalled more words than "
    "those who stayed awake to learn.",
    "Dear Sir or Madam, I am writing to apply for the position of assistant that you advertised. I have worked in "
    "an office for three years and enjoy helping people.",
)

EDITS = (
    "Summarize this text: {d}",
    "Summarize this in one sentence: {d}",
    "Rewrite this in simpler words: {d}",
    "Rewrite this in a formal style: {d}",
    "Rewrite this as a poem: {d}",
    "Make this shorter: {d}",
    "Continue this text: {d}",
    "Correct the mistakes in this text: {d}",
    "What is the main idea of this text? {d}",
    "List the key points of this text: {d}",
    "Write three questions about this text: {d}",
    "Give this text a title: {d}",
    "Translate this text into French: {d}",
    "Translate this text into Spanish: {d}",
    "What happened before this? {d}",
    "Write an answer to this: {d}",
    "Is the tone of this text positive or negative? {d}",
    "Extract all names, dates and numbers from this text as a list: {d}",
)

FOLLOW_UPS = (
    "Can you make that shorter?",
    "Can you give an example?",
    "Please explain that in more detail.",
    "Thank you! What else should I know?",
    "Now write it as a list.",
    "Why is that so?",
    "Rewrite that for a child.",
    "And what about {b}?",
)

_ANSWERS = (
    "Of course! Here is a short answer: {a} is a topic with many sides, and people have long thought about it.",
    "There is a lot to say about {a}. The most important point is that it affects many people in their daily lives.",
    "{a} can be explained in a few steps. First, it helps to know where it comes from. Then one can see how it works.",
)


def chat_prompts(seed: int) -> Iterator[Turns]:
    """Conversations that end with a question, all different, without end; of a seed always the same."""
    rng, seen = random.Random(seed), set[str]()
    while True:
        turns = _one(rng)
        key = repr(turns)
        if key not in seen:
            seen.add(key)
            yield turns


def _one(rng: random.Random) -> Turns:
    kind = rng.choices((ABOUT, CODE, SUMS, EDITS), weights=(70, 12, 8, 10))[0]
    first, second = rng.sample(SUBJECTS, 2)
    fields = {
        "a": first, "b": second, "p": rng.choice(PEOPLE), "l": rng.choice(LANGUAGES), "t": rng.choice(TASKS),
        "n": rng.choice(NAMES), "m": rng.choice(NAMES), "o": rng.choice(THINGS), "d": rng.choice(PASSAGES),
        "x": rng.randint(11, 99), "y": rng.randint(2, 10), "z": rng.randint(100, 999), "w": rng.randint(11, 99),
    }  # fmt: skip
    turns = [{"role": "user", "content": rng.choice(kind).format(**fields)}]
    if rng.random() < 0.08:
        turns.append({"role": "assistant", "content": rng.choice(_ANSWERS).format(**fields)})
        turns.append({"role": "user", "content": rng.choice(FOLLOW_UPS).format(**fields)})
    if rng.random() < 0.15:
        turns.insert(0, {"role": "system", "content": rng.choice(SYSTEMS)})
    return turns
