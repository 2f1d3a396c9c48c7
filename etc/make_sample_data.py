"""Write the sample data set: requests to a spoken assistant, each with its intent.

Reads nothing. Writes train.txt, valid.txt and test.txt (sentence TAB intent; lower case and without punctuation, as a
speech recogniser would hand them on) and gives the same bytes for the same seed on every machine.

    python etc/make_sample_data.py

The sentences come from the templates and slot values below. The valid and test splits have templates and values of
their own, which train lacks, and many requests quote another intent ("remind me to play the tape for mark"), so that
the words of a sentence alone do not give its intent away.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # what is imported below lies beside the stages

from cli.flags import Parser
from sentence_classifier.errors import InputError, fail_cleanly
from util import atomic_write

ROOT = Path(__file__).resolve().parent.parent

NONE = "none_of_these"

SPLITS = {"train": 3000, "valid": 400, "test": 400}

# How often a split takes a template, or a slot value, of its own in place of one that train has too.
OWN_TEMPLATE = {"train": 0.0, "valid": 0.2, "test": 0.25}
OWN_VALUE = {"train": 0.0, "valid": 0.2, "test": 0.3}

LEAD_SHARE = 0.15
TAIL_SHARE = 0.2


class Pool(NamedTuple):
    """Templates, one a line, or slot values, separated by bars: those that every split has and each split's own."""

    train: str
    valid: str = ""
    test: str = ""

    def options(self, split: str, separator: str) -> tuple[list[str], list[str]]:
        """What every split may draw from, and what only `split` may draw from (empty for train)."""
        own = "" if split == "train" else getattr(self, split)
        common, own = ([part.strip() for part in text.strip().split(separator)] for text in (self.train, own))
        return common, [part for part in own if part]


# ----------------------------------------------------------------------------------------------------- slot values

SLOTS = {
    # An imperative starts with {do}; a third of them stand bare.
    "do": Pool("| | | please | can you | could you | could you please | i want you to | i need you to | would you | "
               "i was hoping you could",
               "i would like you to | kindly", "go ahead and | be so kind and | it would be great if you could"),
    "lead": Pool("hey | ok | hi | so | alright | hello there", "hey there", "excuse me | good evening | good morning"),
    "tail": Pool("please | thanks | thank you", "right away", "if you can | when you have a second"),
    "name": Pool("anna | mark | priya | tom | lena | carlos | mei | david | fatima | john", "oliver | ines",
                 "hassan | greta | yuki | samuel"),
    "person": Pool("{name} | {name} | {name} | {name} | my mother | my boss | my brother | the dentist | the landlord",
                   "my cousin | the plumber", "my grandmother | the babysitter | my lawyer | the vet"),
    "artist": Pool("miles davis | adele | radiohead | nina simone | the beatles | bob marley | daft punk | johnny cash",
                   "david bowie | shakira", "ella fitzgerald | metallica | leonard cohen | madonna"),
    "genre": Pool("jazz | rock | hip hop | classical | country | techno | reggae | folk", "soul | disco",
                  "blues | opera | heavy metal | bossa nova"),
    "song": Pool("paper lanterns | morning rain | seven bridges | call me tomorrow | the long road home | "
                 "wake up alice | table for one | set the night on fire", "kitchen light | winter letters",
                 "turn left at memory | a message from mars | cold wind in june | remind me of you"),
    "clock": Pool("7 am | 6 30 | half past eight | noon | 9 in the evening | a quarter to ten | 5 pm | 8 o'clock",
                  "11 15 | 4 in the morning", "midnight | ten past three | 7 45 | twenty to six"),
    "day": Pool("tomorrow | tonight | on friday | on monday morning | this weekend | next tuesday | today",
                "on wednesday | the day after tomorrow", "on thursday evening | next sunday | on new year's eve"),
    "when": Pool("{day} | at {clock} | {day} at {clock} | at {clock} {day}"),
    "span": Pool("ten minutes | an hour | half an hour | two hours | forty five minutes", "five minutes",
                 "a quarter of an hour | ninety minutes | three hours"),
    "city": Pool("paris | berlin | chicago | tokyo | madrid | boston | cairo | oslo", "lisbon | dublin",
                 "naples | seattle | nairobi | prague"),
    "place": Pool("the airport | the train station | {city} | the nearest pharmacy | the art museum | my office | "
                  "the italian restaurant on main street", "the town hall | the closest supermarket",
                  "the football stadium | the harbour | the nearest petrol station | the concert hall"),
    "cuisine": Pool("italian | thai | indian | mexican | french | chinese", "greek | korean",
                    "lebanese | ethiopian | vietnamese | spanish"),
    "venue": Pool("restaurant | bistro | place | diner", "tavern", "steakhouse | brasserie | pizzeria"),
    "party": Pool("two | three | four | six | five people | my family", "seven | eight of us",
                  "nine | a party of ten | me and {name} | a dozen guests"),
    "language": Pool("spanish | french | german | japanese | italian | arabic", "dutch | turkish",
                     "polish | swahili | portuguese | hindi"),
    "device": Pool("lights | heating | fan | television | lamp | radiator", "air conditioning",
                   "blinds | dehumidifier | ceiling light | coffee machine"),
    "room": Pool("kitchen | bedroom | living room | bathroom | hallway", "office",
                 "basement | nursery | garage | attic"),
    "item": Pool("milk | eggs | bread | batteries | olive oil | tomatoes | toothpaste | coffee | an alarm clock",
                 "rice | candles", "flour | shampoo | a road map | light bulbs | lemons | a french dictionary"),
    "list": Pool("shopping list | grocery list | to do list | wish list | packing list", "party list",
                 "hardware list | errands list | christmas list"),
    "condition": Pool("rain | snow | be sunny | be windy | be cold", "be cloudy", "hail | be foggy | freeze | thunder"),
    # What people are reminded of, write to each other and want translated sounds like the other intents.
    "task": Pool("call {person} | buy {item} | book a table for {party} | turn off the {device} | text {name} about "
                 "the rent | water the plants | play chess with {name} | check the weather | take my pills | pick up "
                 "{name} from {place}",
                 "cancel the dinner reservation | feed the cat",
                 "switch the {device} off in the {room} | look up the route to {place} | ring {person} back | "
                 "post the letter | defrost the chicken | play the tape for {name} | set an alarm | get {item}"),
    "news": Pool("i will be late | the {device} in the {room} broke down | dinner is at {clock} | "
                 "it is raining in {city} | i booked a table for {party} | we need {item} | "
                 "i am on my way to {place} | my alarm did not go off | the new {artist} record is great",
                 "the meeting moved to {clock} | i lost my keys",
                 "i cannot find the way to {place} | the forecast looks awful {day} | i forgot to call {person} | "
                 "she should turn down the {device} | the {cuisine} {venue} is fully booked | i want to hear that song "
                 "again | the shopping list is on the fridge"),
    "phrase": Pool("where is the train station | good morning | i would like a table for {party} | "
                   "the weather is nice | how much does it cost | please call a doctor | turn left at the corner | "
                   "i like your music | wake me at {clock}",
                   "see you tomorrow | the bill please",
                   "remind me later | how do i get to the airport | switch off the {device} | it will snow {day} | "
                   "send me a message | do you have {item} | play it again | happy birthday"),
    "thing": Pool("telephone | light bulb | alarm clock | radio | umbrella | compass | shopping list | traffic light",
                  "thermostat", "text message | restaurant menu | weather balloon | record player | road map"),
}

# ------------------------------------------------------------------------------------------------------- templates

INTENTS = {
    "play_music": Pool(
        """{do} play {song} by {artist}
        {do} play some {genre}
        {do} play some {genre} music in the {room}
        {do} put on {artist}
        {do} put on some {genre} while i cook dinner
        i want to hear {song}
        i would like to listen to {artist}
        {do} play {genre} until {clock}
        {do} shuffle my {genre} playlist
        {do} play the latest album by {artist}
        let me hear some {genre} from {city}
        start my {genre} playlist
        {do} turn on some {genre} music
        {do} play the song {song}""",
        """i feel like listening to {song}
        {do} start playing {artist} in the {room}
        how about some {genre} music""",
        """{do} queue up {song}
        {do} stream the new record by {artist}
        i am in the mood for some {genre}
        {do} set the mood with {genre} music
        {do} find me a {genre} radio station
        give me something by {artist} to dance to
        some {artist} would be nice now""",
    ),
    "set_alarm": Pool(
        """{do} set an alarm for {clock}
        {do} wake me up at {clock}
        {do} wake me {day} at {clock}
        {do} set my alarm for {clock} {day}
        i need an alarm at {clock}
        {do} wake me up in {span}
        {do} make sure i wake up at {clock}
        {do} make the alarm ring at {clock}
        i have to get up at {clock} {day} so set the alarm
        {do} change my alarm from {clock} to {clock}
        set an alarm in the {room} for {clock}
        alarm at {clock} {day}
        {do} wake me up with {genre} music at {clock}
        {do} set an alarm so that i do not miss the flight to {city}""",
        """{do} get me up at {clock}
        {do} have the alarm go off {day} at {clock}
        new alarm for {clock}""",
        """{do} make sure that i am awake by {clock}
        i want to be woken at {clock} {day}
        do not let me sleep past {clock}
        {do} move my alarm and wake me at {clock}
        {do} let the alarm play {song} at {clock}
        {do} get me out of bed at {clock} {day}
        {do} add an alarm at {clock} so i can call {person}""",
    ),
    "set_reminder": Pool(
        """{do} remind me to {task}
        {do} remind me to {task} {when}
        {do} remind me {when} to {task}
        {do} set a reminder to {task}
        {do} set a reminder for {clock} to {task}
        do not let me forget to {task}
        i need a reminder to {task} {day}
        {do} remind me about the call with {name} {when}
        {do} remind me in {span} that i have to {task}
        {do} make a reminder that says {task}
        {when} remind me to {task}
        {do} tell me {when} that i need to {task}
        {do} remind me of the dinner with {person}
        {do} remind me to {request}
        {do} remind me {when} to {request}
        {do} set a reminder to {request}
        do not let me forget to {request}""",
        """{do} create a reminder to {task}
        {do} remind me that {news}
        i must not forget to {task} {when}""",
        """{do} give me a nudge {when} to {task}
        make sure i remember to {task}
        {do} tell me {when} that i have to {task}
        {do} notify me in {span} to {task}
        in {span} i have to {task} so do not let me forget
        {do} see to it that i do not forget to {task}
        {do} prompt me to {task} {when}""",
    ),
    "get_weather": Pool(
        """what is the weather in {city}
        what is the weather like in {city} {day}
        will it {condition} {day}
        will it {condition} in {city} {when}
        {do} tell me the forecast for {city}
        how is the weather {day}
        how cold is it in {city}
        {do} check the weather for {city} {day}
        is it going to {condition} {day}
        {do} give me the weather report for {city}
        do i need an umbrella {day}
        what is the temperature in {city} right now
        is it warm enough to eat outside in {city} {day}""",
        """{do} show me the forecast for {city} {day}
        how hot will it get in {city} {day}
        is there any chance that it will {condition} {day}""",
        """should i wear a coat in the cold of {city} {day}
        what will the sky look like over {city} {day}
        {do} look up how many degrees it is in {city}
        is there a storm in the forecast {day}
        is it warm and dry enough {day} for the walk to {place}
        do you expect that it will {condition} before {clock}
        will we need the heating {day} or is it going to be mild""",
    ),
    "book_table": Pool(
        """{do} book a table for {party} at a {cuisine} {venue}
        {do} book a table for {party} {when}
        {do} reserve a table at a {cuisine} {venue} in {city}
        i would like to book a {cuisine} {venue} for {party}
        {do} make a reservation for {party} {when}
        {do} find a {cuisine} {venue} and book a table for {clock}
        i need a table for {party} in {city} {day}
        {do} get me a reservation at a {cuisine} {venue} {day}
        we want to eat {cuisine} food {day} so book us a table
        book the {cuisine} {venue} near {place} for {party}
        reserve a table by the window for {party}
        {do} make a dinner reservation for {person} and me {day}""",
        """{do} book us in at the {cuisine} {venue} {when}
        i want a table for {party} at {clock}
        {do} reserve seats for {party} at a {venue} in {city}""",
        """{do} get {party} in for lunch at a {cuisine} {venue}
        see if the {cuisine} {venue} has room for {party} {when} and reserve it
        {do} hold a table under the name {name} for {clock}
        {party} will be having supper at the {cuisine} {venue} {day} so make the booking
        {do} secure us a spot for dinner at a {venue} in {city}
        {do} arrange a table for {party} close to {place}
        {do} see to it that {party} can sit down for dinner at a {venue} {day}""",
    ),
    "send_message": Pool(
        """{do} send a message to {person}
        {do} text {person} that {news}
        {do} send {person} a message saying {news}
        {do} tell {person} that {news}
        {do} message {person} that {news}
        {do} write to {person} that {news}
        {do} send a text to {name} and say {news}
        {do} let {person} know that {news}
        text {name} {news}
        {do} tell {person} to {request}
        {do} text {person} that i want to {request}
        {do} send {name} a message to {request}
        {do} ask {name} by text to {request}
        {do} send a message asking {person} to {task}
        i want to text {person} about the weather in {city}
        {do} reply to {person} that {news}
        {do} pass the message to {person} that {news}""",
        """{do} inform {person} that {news}
        {do} send {name} a text asking about dinner {day}
        {do} ask {person} by message to {task}""",
        """{do} drop {person} a line that {news}
        {do} shoot {name} a quick note saying {news}
        give {person} the news that {news}
        {do} answer {name} with {news}
        {do} email {person} that {news}
        {do} pass on to {person} that {news}
        {do} get word to {person} that {news}""",
    ),
    "make_call": Pool(
        """{do} call {person}
        {do} call {person} on speaker
        {do} phone {person}
        {do} make a call to {person}
        {do} start a call with {person}
        i want to talk to {person} on the phone
        {do} call the {cuisine} {venue} in {city}
        {do} dial the number of {person}
        call {name} about the reservation {day}
        {do} start a video call with {person} and {name}
        i need to call {place}
        {do} call {person} now and put it on the speaker in the {room}
        {do} call {person} back
        {do} give {person} a call
        {do} get {person} on the phone
        {do} give {person} a call to ask about the weather
        {do} phone {name} to ask about the {device}""",
        """{do} place a call to {person}
        {do} call up {person} about the {item}
        {do} phone the {venue} near {place}""",
        """{do} ring {person}
        {do} get {person} on the line
        connect me with {person} by phone
        {do} give {person} a ring about the weather
        {do} redial the last number that {person} called from
        i would like to speak with {person} so dial now
        {do} put me through to the {cuisine} {venue}
        {do} give {name} a call and i will say that {news}""",
    ),
    "get_directions": Pool(
        """how do i get to {place}
        {do} give me directions to {place}
        {do} navigate to {place}
        {do} show me the way to {place}
        what is the fastest route to {place}
        how far is it to {place}
        {do} find the best way from {place} to {place}
        how long does it take to drive to {place}
        which bus goes to {place}
        i need directions to the {cuisine} {venue} in {city}
        {do} take me to {place} without toll roads
        is there traffic on the road to {place}""",
        """{do} guide me to {place}
        {do} plan a route to {place} {day}
        how long is the walk to {place}""",
        """where do i have to turn to reach {place}
        {do} lead me to the house of {person}
        what is the quickest path from here to {place}
        how many stops is it to {place} by train
        {do} map out a drive to {place} that avoids the snow
        can i make it to {place} by {clock} if i leave now
        which exit do i take for {place}
        {do} get me to the {cuisine} {venue} where we booked a table""",
    ),
    "control_home": Pool(
        """{do} turn on the {device} in the {room}
        {do} turn off the {device} in the {room}
        {do} switch on the {room} {device}
        {do} switch off the {device}
        {do} turn off the {device} {when}
        {do} turn the {room} {device} down
        {do} dim the lights in the {room}
        {do} set the {room} to twenty degrees
        {do} set the heating to 18 degrees at {clock}
        it is too cold in the {room} so turn up the heating
        nobody is watching so the {device} in the {room} can be switched off
        {do} make it brighter in the {room}
        {do} turn off all the lights when i call it a night
        {do} set the {device} timer to {span}""",
        """{do} shut off the {room} {device}
        {do} put the {device} on in the {room}
        {do} lower the temperature in the {room}""",
        """{do} kill the {device} in the {room}
        it is dark in the {room} so do something about the lamp
        {do} power up the {room} {device} in {span}
        {do} warm the {room} up before i wake up at {clock}
        nobody is in the {room} so the {device} can go off
        {do} leave the {device} running until {clock}
        {do} activate the {device} when it starts to rain
        {do} cut the power to the {device} in {span}""",
    ),
    "add_to_list": Pool(
        """{do} add {item} to my {list}
        {do} put {item} on the {list}
        {do} add {item} and {item} to the {list}
        we need {item} so add it to the {list}
        {do} write {item} on my {list}
        {do} add call {person} to my to do list
        {do} put {task} on my to do list
        {do} put {request} on my to do list
        {do} add {request} to the {list}
        the {list} should say {request}
        i want {item} on the {list}
        add {item} to the {list} before {clock}
        {do} add the {artist} album to my wish list
        {do} remember {item} for the {list}
        my {list} needs {item}""",
        """{do} include {item} in the {list}
        {do} add {task} to my to do list {day}
        we are out of {item} so put that on the {list}""",
        """{do} note down {item} on the {list}
        {item} should go on the {list}
        {do} jot {item} onto my {list}
        {do} append {task} to the {list}
        the {list} is missing {item}
        {do} extend my {list} with {item} and {item}
        {do} stick {item} on the {list} before {person} goes shopping""",
    ),
    "translate": Pool(
        """{do} translate {phrase} into {language}
        how do you say {phrase} in {language}
        what is {phrase} in {language}
        {do} translate {phrase} to {language}
        {do} say {phrase} in {language}
        how do you say {request} in {language}
        {do} translate {request} into {language}
        what is {request} in {language}
        what does this {language} sentence mean in english
        {do} translate the message from {person} into {language}
        i need the {language} translation of {phrase}
        {do} tell me how to say {phrase} in {language}
        {do} translate this {language} menu for me
        how would you say {phrase} to a {language} speaker
        what is the {language} word for {item}""",
        """how can i say {phrase} in {language}
        {do} give me {phrase} in {language}
        what do {language} speakers say for {phrase}""",
        """{do} put {phrase} into {language}
        what would {phrase} be in {language}
        {do} turn the words {phrase} into {language}
        i want to tell {person} {phrase} but in {language}
        {do} help me ask {phrase} in {language}
        what is the english for this {language} street sign
        {do} render {phrase} in {language}
        which {language} words mean {phrase}""",
    ),
    NONE: Pool(
        """who invented the {thing}
        how does a {thing} work
        {do} explain how a {thing} is made
        i had {cuisine} food with {name} last night
        {name} called me yesterday and we talked about {artist}
        {do} tell me a joke about a {thing}
        when was {artist} born
        how many people live in {city}
        what is the capital of the country where {city} lies
        i do not like {genre} very much
        why do people in {city} eat so late
        i bought the {device} before i met {name}
        is it rude to {request} at {clock}
        did {name} {request} yesterday
        {name} always wants to {request}
        i used to {request} every week
        who told {name} to {request}
        {name} said {news}
        what is your favourite {genre} song
        {do} write a poem about the rain in {city}
        the {cuisine} {venue} in {city} was too loud
        how many calories are in {item}
        {do} tell me about the history of {genre}
        how old is {person}
        {do} convert {span} into seconds
        who wrote {song}
        how often do people {request}
        i do not have the time to {request}
        {name} was too busy to {request}
        my boss thinks it is silly to {request}
        what is two hundred divided by six
        i was awake until {clock}
        are you a robot""",
        """{do} tell me a story about {name} and a {thing}
        what do you think about {artist}
        it rained the whole time when we were in {city}
        how much does a {thing} cost""",
        """{name} would never {request}
        why did {person} {request}
        i am too tired to {request}
        i slept right through my alarm again
        {name} never answers text messages
        why is {language} so hard to learn
        do you ever get tired of playing music for people
        {do} recommend a book about the people of {city}
        where did {artist} grow up
        the lights of {city} are beautiful at night
        what is the difference between a {venue} and a cafe
        {name} cooked {cuisine} food for us last year
        {do} calculate how many minutes there are in {span}
        is a {thing} allowed on a plane
        {do} tell me what a call centre does
        {do} explain what causes snow
        who was the first person to build a {thing}
        my neighbour plays {genre} far too loud""",
    ),
}

# Those whose imperatives can stand inside other sentences, as in "text mark to {request}".
QUOTED = ["play_music", "book_table", "make_call", "control_home", "get_directions"]

SLOT = re.compile(r"\{(\w+)\}")
ARTICLE = re.compile(r"\ba(?= [aeiou])")  # "a", where a slot's value asks for "an"


class Writer:
    """Draws the sentences of all splits, none of them twice."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seen: set[str] = set()

    def choose(self, options: list[str]) -> str:
        """One of `options`. Only random() itself is promised to give the same numbers in every Python version."""
        return options[int(self.random.random() * len(options))]

    def draw(self, pool: Pool, split: str, separator: str, own_share: float) -> str:
        """A template or value, with the chance `own_share` one that train lacks."""
        common, own = pool.options(split, separator)
        return self.choose(own if own and self.random.random() < own_share else common)

    def value(self, slot: str, split: str) -> str:
        """A slot value that may hold slots itself."""
        if slot == "request":
            return self.request(split)
        return self.draw(SLOTS[slot], split, "|", OWN_VALUE[split])

    def request(self, split: str) -> str:
        """A bare request of one of the intents that quote no other."""
        while True:
            template = self.draw(INTENTS[self.choose(QUOTED)], split, "\n", OWN_TEMPLATE[split])
            if template.startswith("{do}"):
                return template.removeprefix("{do} ")

    def sentence(self, intent: str, split: str) -> str:
        """One sentence, possibly one that was drawn before."""
        template = self.draw(INTENTS[intent], split, "\n", OWN_TEMPLATE[split])
        if template.startswith("{do}") and self.random.random() < TAIL_SHARE:
            template += " {tail}"
        if self.random.random() < LEAD_SHARE:
            template = "{lead} " + template
        while SLOT.search(template):
            template = SLOT.sub(lambda match: self.value(match[1], split), template)
        return ARTICLE.sub("an", " ".join(template.split()))

    def new_sentence(self, intent: str, split: str) -> str:
        """One sentence that no split has yet."""
        for _ in range(1000):
            sentence = self.sentence(intent, split)
            if sentence not in self.seen:
                self.seen.add(sentence)
                return sentence
        raise InputError(f"{__file__}: the templates of {intent} are too few for {split}.txt; write some more.")

    def lines(self, split: str) -> list[str]:
        """All lines of a split in random order: every intent equally often, and NONE takes what is left over."""
        intents = list(INTENTS)
        share = int(SPLITS[split] / (len(intents) + 0.25))
        intents = [intent for intent in intents for _ in range(share)]
        intents += [NONE] * (SPLITS[split] - len(intents))
        lines = [f"{self.new_sentence(intent, split)}\t{intent}\n" for intent in intents]
        return sorted(lines, key=lambda _: self.random.random())


def get_params(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "data" / "sample",
                        help="where train.txt, valid.txt and test.txt go (default: data/sample of this project)")
    parser.add_argument("--seed", type=int, default=42, help="another seed gives other sentences (default: 42)")
    return parser.parse_args(argv)


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Write the three splits.

    Raises:
        InputError: the folder cannot be written.
    """
    args = get_params(argv)
    writer = Writer(args.seed)
    for split, lines in {split: writer.lines(split) for split in SPLITS}.items():
        path = args.output_dir / f"{split}.txt"
        try:
            with atomic_write(path) as file:
                file.writelines(lines)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --output_dir.") from None
        print(f"{path}: {len(lines)} sentences", file=sys.stderr)


if __name__ == "__main__":
    main()
