"""What a small model should say when it is asked for what it never learnt: friendly, short, and true.

Questions are made from many openings and many subjects, invented words among them, so that what the model learns is "none
of my tasks" rather than a list. Every reply names what the model can do or gives a question to try.
"""

import random
from collections.abc import Iterator

EXAMPLES = (
    "What is 27 + 45?",
    "Sort 21 17 35 from small to large.",
    "Mia has 37 shells, finds 8, loses 5. How many shells now?",
    "What is 17 * 4?",
)
ABILITIES = (
    "I can add, subtract and multiply small numbers, follow short stories of things gained and lost, and sort numbers."
)

GREETINGS = (
    "Hello",
    "Hi",
    "hi",
    "hello",
    "Hey",
    "Good morning",
    "Good evening",
    "Hi there",
    "Hello!",
    "hey there",
    "Hi!",
    "yo",
)
THANKS = (
    "Thanks",
    "thank you",
    "Thank you!",
    "thanks a lot",
    "Great, thanks",
    "Well done",
    "Bye",
    "Goodbye",
    "ok",
    "OK",
    "good",
    "nice",
)
WHO = (
    "Who are you?", "who are you", "What are you?", "What is your name?", "Are you a person?", "Are you DeepSeek?",
    "Are you ChatGPT?", "Who made you?", "How big are you?", "what model are you",
)  # fmt: skip
ABILITY = (
    "What can you do?", "what can you do", "Help", "help", "How can you help me?", "What do you know?", "What are you good at?",
    "Can you help me?", "What should I ask?", "Give me an example", "?", "what now",
)  # fmt: skip
OPENINGS = (
    "What is the capital of {}?", "Tell me about {}.", "Write a poem about {}.", "Who was {}?", "Why is the {} {}?", "Explain {} to me.",
    "Translate {} into French.", "How do I cook {}?", "What is the weather in {}?", "Write a program that prints {}.",
    "Do you like {}?", "Tell me a joke about {}.", "Where can I buy {}?", "How old is {}?", "Summarise {}.", "What does {} mean?",
    "When did {} begin?", "Give me advice on {}.", "Is {} better than {}?", "Draw a {}.", "I feel {} today.", "What colour is {}?",
    "How do {} and {} differ?", "What is a {}?", "what is {}", "Who wrote {}?", "Spell {}.", "Name three kinds of {}.", "{}", "{} {}",
    "Which {} is the best?", "Can you {}?", "Please {} the {}.", "My {} is {}.", "Who won the {} in {}?", "How many people live in {}?",
    "How far is {} from {}?", "Continue: {} {} {}", "Is it true that {} is {}?", "Let us talk about {}.",
)  # fmt: skip
SUBJECTS = (
    "France", "Peru", "love", "the sea", "quantum physics", "dogs", "my mother", "Napoleon", "music", "rain", "bread", "history", "a car",
    "Python", "the moon", "time", "money", "chess", "winter", "Shakespeare", "football", "coffee", "truth", "flowers", "Berlin", "trees",
    "the news", "God", "sleep", "tax", "a house", "art", "paint", "sing", "dance", "blue", "sad", "happy", "old", "sky", "grass", "health",
    "space", "war", "peace", "Einstein", "rice", "soup", "India", "a story", "birds", "the sun", "computers", "school", "Rome", "gold",
)  # fmt: skip
LETTERS = "aaabcdeeefghiiijklmnooopqrstuuuvwxyz"


def small_talk(rng: random.Random) -> tuple[str, str]:
    """One question outside the tasks, and the reply."""
    kind = rng.random()
    example = rng.choice(EXAMPLES)
    if kind < 0.1:
        return rng.choice(GREETINGS), f"Hello! {ABILITIES} Try: {example}"
    if kind < 0.15:
        return rng.choice(THANKS), f"You are welcome. Here is another one to try: {example}"
    if kind < 0.25:
        return rng.choice(
            WHO
        ), f"I am the small model that comes with Shoal, trained from scratch on a CPU. {ABILITIES}"
    if kind < 0.35:
        return rng.choice(ABILITY), f"{ABILITIES} Try: {example}"
    return _unknown(rng), f"I have not learnt that. {ABILITIES} Try: {example}"


def _unknown(rng: random.Random) -> str:
    opening = rng.choice(OPENINGS)
    return opening.format(*(_subject(rng) for _ in range(opening.count("{}"))))


def _subject(rng: random.Random) -> str:
    return rng.choice(SUBJECTS) if rng.random() < 0.5 else " ".join(_words(rng))


def _words(rng: random.Random) -> Iterator[str]:
    for _ in range(rng.randint(1, 2)):
        yield "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 9)))
