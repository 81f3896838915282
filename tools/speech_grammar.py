"""A grammar of spoken commands, numbers, names and dates, in plain lower-case words.

A template is a text with `{slots}`; a slot is replaced by one of its fillers, which may hold slots
themselves. Numbers are spelled out, so that what is said and what is written agree word for word.
"""

import random
import re

# Fillers are separated by bars; one that stands there twice is drawn twice as often.
SLOTS = {
    "unit": "one|two|three|four|five|six|seven|eight|nine",
    "digit": "zero|{unit}|{unit}|{unit}|{unit}|{unit}|{unit}|{unit}|{unit}|{unit}",
    "few": "two|three|four|five|six|seven|eight|nine|ten",
    "teen": "ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen",
    "tens": "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety",
    "number": "{unit}|{teen}|{teen}|{tens}|{tens} {unit}|{tens} {unit}",
    "hundreds": "{unit} hundred|{unit} hundred and {number}",
    "hour": "{unit}|{unit}|{unit}|ten|eleven|twelve",
    "past": "ten|fifteen|twenty|thirty|forty five|fifty",
    "time": "{hour} {past}|{hour} {past}|half past {hour}",
    "weekday": "monday|tuesday|wednesday|thursday|friday|saturday|sunday",
    "month": "january|february|march|april|may|june|july|august|september|october|november|"
    "december",
    "ordinal": "first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|"
    "twentieth|thirtieth",
    "date": "the {ordinal} of {month}|{month} the {ordinal}|{weekday} the {ordinal}",
    "day": "{weekday}|{date}",
    "soon": "today|tonight|tomorrow|next {weekday}",
    "name": "anna|peter|martin|lucy|david|maria|thomas|helen|robert|julia|oscar|emma|daniel|victor",
    "surname": "smith|brown|taylor|wilson",
    "person": "{name}|{name}|{name} {surname}",
    "city": "london|paris|berlin|prague|vienna|madrid|rome|boston|dublin|chicago|toronto",
    "room": "kitchen|bedroom|bathroom|garage|garden|office",
    "device": "lamp|heater|radio|television|oven|camera|speaker",
    "opening": "door|window|gate",
    "switch": "turn|switch",
    "state": "on|off",
    "span": "minutes|hours|seconds",
    "colour": "red|green|blue|yellow|white|black",
    "thing": "apples|oranges|bananas|tomatoes|potatoes|eggs",
    "food": "bread|butter|milk|sugar|coffee|cheese|rice",
    "place": "airport|station|hospital|museum",
    "vehicle": "train|bus|plane",
    "style": "jazz|piano|guitar|dance",
    "event": "meeting|dinner|lesson|concert",
    "message": "message|letter|picture",
}

# A group is drawn first, then a template within it.
TEMPLATES = {
    "home": "{switch} {state} the {room} {device}|"
    "please {switch} the {room} {device} {state}|"
    "{switch} {state} the {colour} {device} in the {room}|"
    "open the {colour} {opening} in the {room}|"
    "please close the {room} {opening}|"
    "lock the {room} {opening} at {time}|"
    "set the {room} {device} to {number} percent",
    "clock": "wake me up at {time} on {weekday}|"
    "set a timer for {number} {span}|"
    "set the alarm for {time} on {day}|"
    "remind me in {number} {span} to call {name}|"
    "stop the timer in {number} {span}",
    "people": "call {person} on {weekday} at {time}|"
    "please call {person} {soon}|"
    "send a {message} to {person} {soon}|"
    "{name} {surname} lives in {city}|"
    "{person} works with {name} in {city}|"
    "read the {ordinal} {message} from {person}",
    "calendar": "the {event} with {person} is on {date}|"
    "move the {event} from {weekday} to {day}|"
    "book a table for {few} on {day}|"
    "my {event} is on {date}|"
    "cancel the {event} on {day}",
    "numbers": "the code is {digit} {digit} {digit} {digit}|"
    "my number is {digit} {digit} {digit} {digit} {digit}|"
    "the answer is {hundreds}|"
    "the price is {hundreds} dollars|"
    "{number} plus {number} is {number}|"
    "{number} minus {number} is {number}",
    "shopping": "add {few} {thing} and some {food} to the list|"
    "buy {number} {colour} {thing}|"
    "we need {food} and {food} for {soon}|"
    "buy some {food} and {number} {thing}|"
    "how much are {number} {thing}",
    "travel": "take me to the {place} in {city}|"
    "how far is the {place} from the {place} in {city}|"
    "the {vehicle} to {city} leaves at {time}|"
    "what is the weather in {city} {soon}|"
    "will it rain in {city} on {weekday}|"
    "two tickets from {city} to {city} for {soon}",
    "music": "play some {style} music in the {room}|"
    "play the {ordinal} song by {person}|"
    "please play {number} {style} songs|"
    "stop the music in the {room} at {time}",
}

SLOT = re.compile(r"\{(\w+)\}")
FILLERS = {name: fillers.split("|") for name, fillers in SLOTS.items()}
GROUPS = [templates.split("|") for templates in TEMPLATES.values()]
LONGEST = 10  # words


def sentence(draw: random.Random) -> str:
    """One sentence of at most `LONGEST` words; it depends on `draw` alone."""
    while True:
        text = draw.choice(draw.choice(GROUPS))
        while match := SLOT.search(text):
            text = text[: match.start()] + draw.choice(FILLERS[match[1]]) + text[match.end() :]
        if len(text.split()) <= LONGEST:
            return text


def vocabulary() -> set[str]:
    """Every word that the grammar can say."""
    texts = [text for texts in (*FILLERS.values(), *GROUPS) for text in texts]
    return {word for text in texts for word in SLOT.sub(" ", text).split()}
