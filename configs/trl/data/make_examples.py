"""Writes the examples that `configs/trl` trains on: `train.jsonl` and `test.jsonl`, beside this file.

Everything here was written for this project: tables of facts, explanations, instructions and letters by hand, and a
few functions that ask about them in different words. Running it again gives the same files byte for byte:

    python configs/trl/data/make_examples.py

About every fourth conversation has more than one turn, and about every third has a system message that changes the
answer: the same question is answered in one word, with the reason, or step by step, depending on it. So a model that
ignores the prompt cannot do well, which is what makes the prompt's weight worth a look.

No user message of `test.jsonl` occurs in `train.jsonl`. Its topics do: a test question may be about a country of
which another question is in the training set.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
TEST_EXAMPLES = 100
SEED = 0

Chat = dict[str, list[dict[str, str]]]


def table(text: str) -> list[list[str]]:
    """Rows of fields divided by `|`. An indented line goes on with the row above."""
    rows = re.sub(r"\n +", " ", text).strip().split("\n")
    return [[field.strip() for field in row.split("|")] for row in rows]


# System messages, each in more than one wording. The answers below keep to them.
SHORT = ("Answer in one short sentence.", "Keep every answer to one short sentence.", "Be brief: one sentence only.")
FEW_WORDS = ("Answer in a few words, without a full sentence.", "Give only the answer itself, nothing around it.")
ONE_WORD = ("Answer with one word.", "Reply with a single word and nothing else.")
ONE_MORE = ("Answer the question, then add one more fact.", "After each answer, add one thing worth knowing.")
QUIZ = ("You are the cheerful host of a quiz show.", "You host a quiz show. Be cheerful and ask if they want more.")
TEACHER = (
    "You are a patient teacher. Use an example from daily life.",
    "Explain like a patient teacher, with an everyday example.",
)
WORKING = ("You are a patient teacher. Show how you reach the answer.", "Show each step of the calculation.")
NUMBER = ("Answer with the number only, written in words.", "Give only the number, in words.")
ONE_STEP = (
    "Give one step at a time, and wait until the user is ready for the next.",
    "Tell the user a single step, then wait.",
)
LIST = ("Answer with a numbered list and nothing else.", "Write every answer as a numbered list.")
EDITOR = ("You are an editor. Reply with the new text only.", "Return the rewritten text and no comment.")
OFFICE = ("You write letters for an office. Leave out the subject line.", "Write the letter without a subject line.")
COACH = ("You are a friendly coach. End with a word of encouragement.", "Always close with an encouraging sentence.")


def chat(*turns: str, system: str | None = None) -> Chat:
    """A conversation: what the user and the assistant say by turns, the user first."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"messages": messages}


def pick(options: Sequence[str], index: int) -> str:
    """One of the wordings, going round as the index grows."""
    return options[index % len(options)]


def cap(text: str) -> str:
    """The text with a capital first letter."""
    return text[0].upper() + text[1:]


def listing(items: Sequence[str]) -> str:
    """`a, b and c`."""
    return f"{', '.join(items[:-1])} and {items[-1]}"


# --------------------------------------------------------------------------------------------------------- countries

# Columns: name, capital, most widely used language, continent, one more fact.
COUNTRIES = table("""
Norway | Oslo | Norwegian | Europe | Its western coast is cut by long, deep arms of the sea called fjords.
Sweden | Stockholm | Swedish | Europe | More than half of the country is covered with forest.
Finland | Helsinki | Finnish | Europe | It has more than a hundred thousand lakes.
Denmark | Copenhagen | Danish | Europe | No place in it is far from the sea.
Iceland | Reykjavik | Icelandic | Europe | Hot water from under the ground heats most of its houses.
Ireland | Dublin | English | Europe | Its national symbol is the harp.
France | Paris | French | Europe | The Loire is its longest river.
Spain | Madrid | Spanish | Europe | It shares a peninsula with Portugal.
Portugal | Lisbon | Portuguese | Europe | It produces more cork than any other country.
Italy | Rome | Italian | Europe | On a map it looks like a tall boot.
Greece | Athens | Greek | Europe | It has thousands of islands, and most of them are empty.
Germany | Berlin | German | Europe | It has borders with nine other countries.
Austria | Vienna | German | Europe | The Alps cover more than half of it.
Poland | Warsaw | Polish | Europe | The Vistula is its longest river.
Hungary | Budapest | Hungarian | Europe | It is known for its hot springs.
Romania | Bucharest | Romanian | Europe | Most of the delta of the Danube lies in it.
the Netherlands | Amsterdam | Dutch | Europe | About a quarter of its land lies below sea level.
Egypt | Cairo | Arabic | Africa | Nearly all of its people live close to the Nile.
Morocco | Rabat | Arabic | Africa | The Atlas mountains run through it.
Kenya | Nairobi | Swahili | Africa | The equator runs through it.
Ghana | Accra | Akan | Africa | It is one of the largest growers of cocoa.
Nigeria | Abuja | English | Africa | No other country in Africa has so many people.
Senegal | Dakar | Wolof | Africa | The western tip of the African mainland is there.
Ethiopia | Addis Ababa | Amharic | Africa | The coffee plant comes from its forests.
Japan | Tokyo | Japanese | Asia | Its highest mountain is Mount Fuji.
China | Beijing | Chinese | Asia | The Yangtze is its longest river.
India | New Delhi | Hindi | Asia | No other country has so many people.
Nepal | Kathmandu | Nepali | Asia | Its flag is the only national flag that is not a rectangle.
Thailand | Bangkok | Thai | Asia | It is one of the largest sellers of rice.
Vietnam | Hanoi | Vietnamese | Asia | It lies along the sea in the shape of a long letter S.
Mongolia | Ulaanbaatar | Mongolian | Asia | Few countries have so much land for so few people.
Canada | Ottawa | English | North America | It has the longest coastline of any country.
Mexico | Mexico City | Spanish | North America | Maize was first grown there.
Cuba | Havana | Spanish | North America | It is the largest island of the Caribbean.
Brazil | Brasilia | Portuguese | South America | Most of the Amazon rainforest lies in it.
Argentina | Buenos Aires | Spanish | South America | The highest mountain of the Americas stands there.
Peru | Lima | Spanish | South America | The old Inca town of Machu Picchu is there.
Chile | Santiago | Spanish | South America | It is long and narrow, between the Andes and the Pacific.
Australia | Canberra | English | Oceania | Most of its people live near the coast.
New Zealand | Wellington | English | Oceania | It has several sheep for each of its people.
""")


def countries() -> list[Chat]:
    """Capitals, languages and continents, alone and one after the other."""
    made = []
    for i, (name, capital, language, continent, fact) in enumerate(COUNTRIES):
        ask = pick(
            (
                f"What is the capital of {name}?",
                f"Which city is the capital of {name}?",
                f"Name the capital of {name}.",
                f"I am doing a crossword. The capital of {name}?",
                f"Do you know what the capital of {name} is?",
            ),
            i,
        )
        full = pick((f"The capital of {name} is {capital}.", f"{capital} is the capital of {name}."), i // 2)
        speak = pick((f"Which language do most people learn in {name}?", f"What do people speak in {name}?"), i)
        spoken = f"{language} is the most widely used language in {name}."
        where = pick((f"On which continent is {name}?", f"Which part of the world is {name} in?"), i // 2)
        match i % 8:
            case 0 | 5:
                made.append(chat(ask, full))
            case 1:
                made.append(chat(ask, f"{capital}.", system=pick(FEW_WORDS, i)))
                made.append(chat(speak, f"{language}.", system=pick(FEW_WORDS, i + 1)))
            case 2:
                made.append(chat(ask, f"{full} {cap(name)} is in {continent}.", system=pick(ONE_MORE, i // 8)))
            case 3:
                made.append(chat(ask, f"It is {capital}.", f"And which language do they speak in {name}?", spoken))
            case 4:
                made.append(chat(ask, f"It is {capital}! Shall we do another?", system=pick(QUIZ, i // 8)))
                made.append(chat(where, f"{cap(name)} is in {continent}. {fact}", system=pick(ONE_MORE, i)))
            case 6:
                made.append(chat(f"Tell me something about {name}.", f"{cap(name)} is in {continent}. {fact}"))
                made.append(chat(f"My sister moved to {capital}. Which country is that in?", f"It is in {name}."))
            case 7:
                turns = (f"I am going to {capital}.", f"How nice! That is the capital of {name}.")
                made.append(chat(*turns, f"What do they speak in {capital}?", f"Mostly {language}."))
        if i % 3 == 0:
            made.append(chat(where, f"{cap(name)} is in {continent}."))
    return made


# ----------------------------------------------------------------------------------------------------------- animals

# Columns: name, kind, food, home, young, one more fact.
ANIMALS = table("""
a fox | a mammal | mice, birds and berries | in woods and fields | a cub | It can hear a mouse under snow.
an otter | a mammal | fish and crabs | in rivers and along coasts | a pup | Its thick fur keeps its skin dry.
a hedgehog | a mammal | beetles and worms | in gardens and hedges | a hoglet | It rolls up when it is afraid.
a bat | a mammal | insects or fruit | in caves and old trees | a pup | It is the only mammal that truly flies.
a blue whale | a mammal | krill | in the open sea | a calf | No larger animal is known to have lived.
a dolphin | a mammal | fish and squid | in the sea | a calf | It breathes through a hole on top of its head.
a kangaroo | a mammal | grass and leaves | in Australia | a joey | The mother carries her young in a pouch.
an elephant | a mammal | grass, leaves and bark | in Africa and Asia | a calf | It greets others with its trunk.
a giraffe | a mammal | the leaves of trees | in Africa | a calf | It is the tallest animal on land.
a camel | a mammal | dry grass and thorny plants | in deserts | a calf | Its hump stores fat, not water.
a polar bear | a mammal | mostly seals | in the Arctic | a cub | Its skin is black under the pale fur.
a beaver | a mammal | bark and water plants | in rivers and ponds | a kit | It builds dams of branches and mud.
an owl | a bird | mice and other small animals | in woods and barns | an owlet | It flies almost without a sound.
a penguin | a bird | fish and krill | on the coasts of the far south | a chick | It cannot fly, but it swims well.
an ostrich | a bird | plants and seeds | on the plains of Africa | a chick | It is the largest living bird.
a swallow | a bird | flying insects | in barns and over open fields | a chick | It spends the winter in a warm
    country.
a woodpecker | a bird | grubs and insects | in woods | a chick | It drums on trees to call its mate.
a duck | a bird | water plants and insects | on ponds and lakes | a duckling | Oil on its feathers keeps water out.
a frog | an amphibian | insects and slugs | in ponds and wet meadows | a tadpole | It takes in water through its skin.
a salamander | an amphibian | worms and slugs | in damp woods | a larva | It can grow a lost leg again.
a crocodile | a reptile | fish and larger animals | in warm rivers | a hatchling | Its relatives lived beside the
    dinosaurs.
a tortoise | a reptile | grass and leaves | on warm, dry land | a hatchling | Some live for more than a hundred years.
a gecko | a reptile | insects and spiders | in warm countries | a hatchling | Tiny hairs on its toes let it walk up
    glass.
a salmon | a fish | smaller fish and shrimps | in rivers and in the sea | a fry | It lays its eggs in the river it
    came from.
a shark | a fish | fish and squid | in all oceans | a pup | Its skeleton is cartilage, not bone.
a seahorse | a fish | tiny shrimps | in warm, shallow seas | a fry | The father carries the eggs in a pouch.
a honeybee | an insect | nectar and pollen | in hives | a larva | It shows others the way to flowers by dancing.
a butterfly | an insect | nectar | in meadows and gardens | a caterpillar | It tastes with its feet.
an ant | an insect | seeds and other insects | in nests in the ground | a larva | It can carry many times its own
    weight.
a ladybird | an insect | greenflies | in gardens and fields | a larva | Its colours warn birds of its bad taste.
a spider | an arachnid | insects | almost everywhere on land | a spiderling | It has eight legs, unlike an insect.
""")


def animals() -> list[Chat]:
    """What animals eat, where they live, what they are."""
    made = []
    for i, (name, kind, food, home, young, fact) in enumerate(ANIMALS):
        bare = name.split(" ", 1)[1]
        eats = pick((f"What does {name} eat?", f"What is the food of {name}?", f"What can {name} live on?"), i)
        lives = pick((f"Where does {name} live?", f"Where would I look for {name}?"), i)
        young_of = pick((f"What is a young {bare} called?", f"What do you call the young of {name}?"), i)
        which = pick((f"What kind of animal is {name}?", f"Which group of animals does {name} belong to?"), i)
        match i % 6:
            case 0:
                made.append(chat(eats, f"{cap(name)} eats {food}."))
                made.append(chat(young_of, f"{cap(young)}.", system=pick(FEW_WORDS, i // 6)))
            case 1:
                made.append(chat(lives, f"You can find {name} {home}.", eats, f"It eats {food}. {fact}"))
            case 2:
                made.append(chat(which, f"{cap(name)} is {kind}. {fact}", system=pick(ONE_MORE, i // 6)))
                made.append(chat(lives, f"{cap(name)} lives {home}."))
            case 3:
                turns = (young_of, f"{cap(young)}.", f"And what does {name} eat?", f"{cap(food)}.")
                made.append(chat(*turns, system=pick(FEW_WORDS, i // 6)))
            case 4:
                made.append(chat(f"Is {name} an insect?", _is_insect(name, kind)))
                made.append(chat(f"Tell me one surprising thing about {name}.", fact))
            case 5:
                made.append(chat(which, f"It is {kind}.", f"Where does one find {name}?", f"{cap(home)}."))
                made.append(chat(eats, f"It eats {food}! Are you ready for one more?", system=pick(QUIZ, i // 6)))
    return made


def _is_insect(name: str, kind: str) -> str:
    return f"Yes, {name} is an insect." if kind == "an insect" else f"No, {name} is {kind}."


# ------------------------------------------------------------------------------------------------------------- words

# Columns: word, meaning, opposite, near synonym, a sentence.
WORDS = table("""
brave | ready to face danger or pain | cowardly | fearless | The brave girl climbed up to save the cat.
generous | glad to give more than one has to | mean | kind | Our generous neighbour shared her whole harvest.
ancient | very old | modern | old | They found an ancient coin under the floor.
fragile | easily broken | sturdy | delicate | Please carry the fragile glasses one by one.
enormous | very large | tiny | huge | An enormous tree shaded the whole square.
silent | making no sound | noisy | quiet | The house was silent after the guests had left.
honest | telling the truth | dishonest | truthful | An honest man brought my purse back.
curious | wanting to know more | indifferent | interested | The curious child asked how the clock worked.
rapid | happening fast | slow | quick | The nurse noticed his rapid pulse.
scarce | hard to find because there is little of it | plentiful | rare | Water is scarce in the desert.
gloomy | dark and sad | cheerful | dismal | On gloomy days we light the lamps early.
cautious | careful to avoid danger | reckless | careful | A cautious driver slows down in fog.
humble | not thinking too highly of oneself | proud | modest | The humble winner thanked her team first.
weary | very tired | fresh | exhausted | The weary travellers sat down by the fire.
temporary | lasting for a short time | permanent | passing | We built a temporary bridge of planks.
polite | showing good manners | rude | courteous | A polite letter often gets a quick reply.
narrow | not wide | wide | slender | A narrow path led through the corn.
lazy | not willing to work | hard-working | idle | The lazy dog slept through the storm.
damp | slightly wet | dry | moist | Please hang up the damp towel.
stubborn | not willing to change one's mind | yielding | obstinate | The stubborn mule would not move.
tidy | with everything in its place | messy | neat | Her desk is always tidy in the evening.
useful | helping to get something done | useless | handy | A map is useful in a strange town.
expand | to become larger | shrink | grow | Metal rails expand in the heat of summer.
forbid | to say that something must not be done | allow | ban | The rules forbid running near the pool.
gather | to bring together in one place | scatter | collect | We gather nuts in the autumn.
repair | to make something work again | break | mend | My uncle can repair any bicycle.
whisper | to speak very softly | shout | murmur | Please whisper in the reading room.
vanish | to go out of sight suddenly | appear | disappear | The fog will vanish before noon.
victory | the winning of a contest | defeat | triumph | The whole village celebrated the victory.
admire | to think highly of | despise | respect | We admire her patience.
begin | to do the first part of something | finish | start | We begin the lesson with a song.
increase | to become more | decrease | rise | Prices increase when goods are hard to get.
""")


def words() -> list[Chat]:
    """Meanings, opposites, synonyms and sentences."""
    made = []
    for i, (word, meaning, opposite, synonym, sentence) in enumerate(WORDS):
        define = pick(
            (f'What does "{word}" mean?', f'Explain the word "{word}".', f'Give me the meaning of "{word}".'), i
        )
        contrary = pick((f'What is the opposite of "{word}"?', f'Which word means the reverse of "{word}"?'), i // 2)
        alike = pick((f'Find another word for "{word}".', f'Which word is close in meaning to "{word}"?'), i // 2)
        match i % 4:
            case 0:
                made.append(chat(define, f'"{cap(word)}" means {meaning}. For example: {sentence}'))
                made.append(chat(contrary, f"{cap(opposite)}.", system=pick(ONE_WORD, i // 4)))
            case 1:
                use = f'Can you use "{word}" in a sentence?'
                made.append(chat(define, f'"{cap(word)}" means {meaning}.', use, sentence))
            case 2:
                turns = (contrary, f"{cap(opposite)}.", f'And a word that is close to "{word}"?', f"{cap(synonym)}.")
                made.append(chat(*turns, system=pick(ONE_WORD, i // 4)))
            case 3:
                made.append(chat(f'Write a sentence with the word "{word}".', sentence))
                made.append(chat(define, f"It means {meaning}.", system=pick(SHORT, i // 4)))
        if i % 2:
            turns = (alike, f'Another word for "{word}" is "{synonym}".')
            opposite_of = (f'And what is the opposite of "{word}"?', f'It is "{opposite}".')
            made.append(chat(*turns, *opposite_of) if i % 3 else chat(*turns))
    return made


# ------------------------------------------------------------------------------------------------------ explanations

# Columns: question, the answer in a sentence, more detail, an everyday example.
EXPLANATIONS = table("""
Why is the sky blue? | The air scatters blue light more than red light. | So blue light reaches our eyes from every
    side, while the other colours come mostly straight from the sun. | Think of a pole in a lake: small ripples bounce
    off it to all sides, while a long wave rolls past.
Why does the moon change its shape? | We see different parts of its sunlit half as it goes around the earth. | The
    moon itself stays round. One round of all its shapes takes about a month. | Hold a ball near a lamp and walk
    around it: you see a full circle, then a half, then a thin curve.
Why do we have day and night? | The earth turns around once in about twenty-four hours. | The side that faces the sun
    has day, and the other side has night. | Turn slowly in front of a window: the light is on your face, and a moment
    later it is on your back.
Why are there seasons? | The axis of the earth is tilted. | So each half of the earth leans towards the sun for a part
    of the year and gets longer and warmer days. | A torch held straight above a table lights it strongly, and the
    same torch held at an angle lights it weakly.
Why does ice float? | Ice is lighter than the same volume of water. | Water takes up more room when it freezes, so a
    piece of ice pushes away its own weight before it goes under. | You can see it in a glass of lemonade, where the
    ice cubes always come to the top.
Why is the sea salty? | Rivers carry salts from the rocks into the sea. | The water rises again as vapour, but the
    salts stay behind, and so they have become more over a very long time. | When soup boils for an hour it tastes
    saltier, because the water leaves and the salt does not.
How does a rainbow form? | Drops of rain split sunlight into its colours. | The light bends when it enters a drop, is
    reflected at the back, and bends again on its way out. | You can make one with a garden hose if you stand with
    your back to the sun.
Why do leaves turn yellow in autumn? | Trees take the green colour out of their leaves before winter. | The yellow was
    there all summer, but the green was stronger. | It is like a painted wall: when the top coat goes, you see the
    colour that was under it.
Why do we yawn? | Nobody knows for sure, but we yawn most when we are tired or bored. | Some researchers think that it
    cools the brain, and it is easily passed on from one person to another. | Watch a class after lunch: one child
    yawns, and soon half of the others do.
How does soap clean our hands? | One end of soap sticks to grease and the other end to water. | So the water can carry
    the grease away, and the dirt and germs go with it. | A greasy pan under plain water stays greasy, and with one
    drop of soap it comes clean.
Why does bread rise? | Yeast eats sugar in the dough and gives off gas. | The gas is caught in small bubbles, which
    grow until the heat of the oven makes the bread firm. | It works like a balloon: more gas inside means a larger
    balloon.
What is gravity? | Gravity is the pull between things that have mass. | It holds us on the ground and keeps the moon
    near the earth. | Let go of an apple, and it falls: the earth has pulled it down.
Why do we hear an echo? | Sound is thrown back by hard, distant things. | We hear the sound first directly and then
    again after it has travelled to the wall and back. | Throw a ball against a wall and it comes back to you, and a
    shout does the same in the mountains.
Why does a boat made of steel float? | A hollow boat pushes away water that weighs as much as the boat. | A solid lump
    of the same steel pushes away much less water, and so it sinks. | Try it with foil: a little tray floats in the
    sink, but the same foil in a tight ball goes down.
What is a shadow? | A shadow is a place that the light cannot reach. | It appears behind anything that stops the
    light, and it is long when the sun is low. | In the evening your own shadow is much longer than you are.
Why do we need sleep? | The body and the brain repair themselves while we sleep. | The brain also sorts what it has
    learned during the day, and children grow mostly at night. | After a short night it is harder to remember a phone
    number or to stay in a good mood.
How do vaccines work? | A vaccine shows the body what a germ looks like. | The body learns to fight it, so it is
    quicker when the real germ comes. | It is like a fire drill: everyone knows the way out before there is a fire.
Why does metal feel colder than wood? | Metal takes heat away from the hand faster than wood does. | Both may have the
    same temperature, but the skin feels how fast it loses heat. | In a cold kitchen, touch a steel spoon and then a
    wooden one.
What makes thunder? | Lightning heats the air so fast that it bursts apart. | This makes a sound wave, which reaches
    us later than the flash because light is much faster than sound. | If you count the seconds after a flash and
    divide by three, you get its distance in kilometres.
Why do stars twinkle? | Moving air bends their light on its way to us. | The light wobbles a little, so a star seems
    to grow brighter and darker. Seen from space, stars do not twinkle. | A coin at the bottom of a stream seems to
    tremble in the same way.
What is a budget? | A budget is a plan for spending and saving money. | It lists what comes in and what goes out, so
    that you see early when something is missing. | With ten coins a week, you might plan six for food, two for the
    bus and two to save.
What is interest on a loan? | Interest is the price of using someone else's money. | It is usually a part of the loan
    for each year, paid on top of the loan itself. | If you borrow a hundred coins and give back a hundred and five a
    year later, five were the interest.
Why do we pay taxes? | Taxes pay for things that everyone uses. | Roads, schools, hospitals and fire brigades are paid
    for in this way in most countries. | It is like a shared kitchen, where everyone puts some money in a jar for the
    gas and the soap.
How does a bicycle stay upright? | The rider and the front wheel keep steering it back under its weight. | When it
    leans to the left, the wheel turns to the left, and this brings the wheels under the rider again. | You do the
    same with a broom on your palm: you move the hand to where the broom is falling.
How does a fridge keep food cold? | It moves heat from the inside to the outside. | A liquid turns into gas inside and
    takes up heat, and at the back it turns into liquid again and gives it off. | Put a hand behind the fridge, and
    you will feel the warmth that was inside.
Why do onions make us cry? | A cut onion gives off a gas that stings the eyes. | The eyes make tears to wash it away.
    A sharp knife and a cold onion make it less. | It is the same with smoke from a fire: the eyes water until it is
    gone.
What is the water cycle? | Water rises as vapour, forms clouds, falls as rain and flows back. | The heat of the sun
    drives it, and the same water goes round again and again. | A pot with a lid shows it: steam rises, drops form
    under the lid, and they fall back into the soup.
Why should we save energy? | Most energy still costs money and harms the air. | Saving it makes bills smaller and
    leaves more fuel in the ground. | A lamp that burns all night in an empty room helps nobody, and yet somebody pays
    for it.
What is a computer program? | A program is a list of instructions for a computer. | The computer follows them one
    after the other and does exactly what they say, even if they are wrong. | A recipe is much the same: whoever
    follows the steps gets the cake.
What is a password for? | A password proves that you are the right person. | It should be long, hard to guess and
    different for every place where you use one. | It is like the key of your front door: you do not hang it on a nail
    outside.
How do bees make honey? | Bees collect nectar and let its water dry off. | They pass it from one to another, store it
    in cells of wax and fan it with their wings until it is thick. | Cooks do something like it when they boil a thin
    sauce down to a thick one.
Why does popcorn pop? | The water inside each grain turns into steam and bursts it. | The shell holds the steam until
    the pressure is too high, and then the inside swells into white foam. | A shaken bottle of lemonade does the same
    when the cap comes off.
""")


def explanations() -> list[Chat]:
    """One question, answered plainly, in a sentence, or with an example, as the system message asks."""
    made = []
    for i, (question, short, detail, example) in enumerate(EXPLANATIONS):
        again = pick(("Can you give me an example?", "I do not quite see it. Do you have an example?"), i)
        match i % 4:
            case 0:
                made.append(chat(question, f"{short} {detail}"))
                made.append(chat(question, short, system=pick(SHORT, i // 4)))
            case 1:
                made.append(chat(question, f"{short} {example}", system=pick(TEACHER, i // 4)))
            case 2:
                made.append(chat(question, f"{short} {detail}", again, example))
            case 3:
                made.append(chat(question, short, system=pick(SHORT, i // 4 + 1)))
                made.append(chat(question, f"{short} {example}", system=pick(TEACHER, i // 4)))
    return made


# ----------------------------------------------------------------------------------------------------------- how-tos

# Columns: task, steps.
HOW_TOS = table("""
boil an egg | bring water to the boil | lower the egg in with a spoon | wait seven minutes | cool it in cold water
make a cup of tea | boil fresh water | put the tea in a warm pot | pour the water on it | wait four minutes
plant a tree | dig a wide hole | set the roots in it | fill it with soil | water it well
clean a window | wipe off the dust | wash it with soapy water | pull the water off with a blade | dry the edges
sew on a button | thread a needle | go up and down through the holes | wind the thread under the button | tie a knot
change a bicycle tyre | take the wheel off | lift off the old tyre | push the new one on | pump it up
write a good summary | read the whole text | mark the main points | put them in your own words | cut what is not
    needed
prepare for an exam | make a list of the topics | study one topic a day | test yourself | sleep well the night before
fold a paper boat | fold the sheet in half | fold the corners to the middle | turn up the edges | pull the sides apart
wash a woollen jumper | fill a bowl with cool water | add a mild soap | press it gently | dry it flat
paint a room | cover the floor | wash the walls | paint the corners with a brush | roll paint over the rest
cook rice | rinse the rice | add twice as much water | let it simmer with the lid on | let it rest for five minutes
learn a poem by heart | read it aloud | learn two lines at a time | say them without looking | put the parts together
pack a suitcase | write a list | put heavy things at the bottom | roll up the clothes | leave a little room
start a vegetable garden | choose a sunny spot | loosen the soil | sow the seeds in rows | water them every evening
send a parcel | put it in a strong box | fill the gaps with paper | write the address on top | take it to the post
    office
give a short talk | choose one main idea | find two examples | practise with a clock | speak slowly
calm down before an exam | sit up straight | breathe in slowly | breathe out even more slowly | begin with an easy
    question
clean a bicycle chain | wipe it with a cloth | brush it with warm soapy water | let it dry | put a little oil on it
make a fruit salad | wash the fruit | cut it into small pieces | add the juice of a lemon | chill it for an hour
find a word in a dictionary | look at its first letter | go to that part of the book | compare the next letters | read
    the entry
read a map | turn it so that north is at the top | find where you are | look up the signs | follow the way with a
    finger
keep a diary | choose a fixed time | write the date | note what happened and how you felt | read it again after a
    month
light a campfire | clear a safe place | put dry grass in the middle | build a tent of thin sticks | light the grass
""")


def how_tos() -> list[Chat]:
    """The same steps as text, as a list, or one at a time."""
    made = []
    for i, (task, *steps) in enumerate(HOW_TOS):
        ask = pick(
            (f"How do I {task}?", f"Tell me how to {task}.", f"What is the best way to {task}?", f"I want to {task}."),
            i,
        )
        text = f"First, {steps[0]}. Then {steps[1]}. After that, {steps[2]}. Finally, {steps[3]}."
        numbered = "\n".join(f"{n}. {cap(step)}." for n, step in enumerate(steps, 1))
        match i % 3:
            case 0:
                made.append(chat(ask, text))
                made.append(chat(f"Please list the steps: how to {task}.", numbered, system=pick(LIST, i // 3)))
            case 1:
                turns = [
                    ask,
                    f"{cap(steps[0])}.",
                    f"I have done that. What comes next when I {task}?",
                    f"Now {steps[1]}.",
                ]
                turns += ["All right. And then?", f"Then {steps[2]}, and at the end {steps[3]}."]
                made.append(chat(*turns, system=pick(ONE_STEP, i // 3)))
            case 2:
                made.append(chat(ask, numbered, system=pick(LIST, i // 3)))
                made.append(chat(f"What do I do first if I want to {task}?", f"First, {steps[0]}."))
        if i % 4 == 3:
            last = f"And what is the last thing to do when I {task}?"
            made.append(chat(f"What do I need to know to {task}?", text, last, f"At the end, {steps[3]}."))
    return made


# -------------------------------------------------------------------------------------------------------------- sums

UNITS = table("""
zero | one | two | three | four | five | six | seven | eight | nine | ten | eleven | twelve | thirteen | fourteen |
    fifteen | sixteen | seventeen | eighteen | nineteen
""")[0]
TENS = table("- | - | twenty | thirty | forty | fifty | sixty | seventy | eighty | ninety")[0]
NAMES = table("""
Anna | Ben | Clara | David | Emma | Felix | Grace | Henry | Ida | Jonas | Kate | Leo | Mary | Noah | Olga | Paul |
    Rosa | Sam | Tina | Victor
""")[0]
THINGS = table(
    "apples | pencils | stamps | eggs | marbles | books | coins | tickets | shells | cards | plums | buttons"
)[0]


def in_words(number: int) -> str:
    """A number from 0 to 999 in words."""
    if number >= 100:
        rest = f" and {in_words(number % 100)}" if number % 100 else ""
        return f"{UNITS[number // 100]} hundred{rest}"
    if number < 20:
        return UNITS[number]
    return TENS[number // 10] + (f"-{UNITS[number % 10]}" if number % 10 else "")


def sums(rng: random.Random) -> list[Chat]:
    """Small sums in words and small stories, with the result alone, in a sentence, or with the steps."""
    made = []
    for i in range(24):
        a, b = rng.randint(6, 39), rng.randint(3, 19)
        x, y, total = in_words(a), in_words(b), in_words(a + b)
        ask = pick((f"What is {x} plus {y}?", f"Add {x} and {y}.", f"How much is {x} and {y} together?"), i)
        match i % 4:
            case 0:
                made.append(chat(ask, f"{cap(x)} plus {y} is {total}."))
            case 1:
                less = f"And {total} minus {x}?"
                made.append(chat(ask, f"{cap(x)} plus {y} is {total}.", less, f"{cap(total)} minus {x} is {y}."))
            case 2:
                made.append(chat(ask, f"{cap(total)}.", system=pick(NUMBER, i // 4)))
            case 3:
                made.append(chat(ask, _add_in_steps(a, b), system=pick(WORKING, i // 4)))
    for i in range(14):
        b = rng.randint(3, 12)
        a = b + rng.randint(4, 20)
        x, y, left = in_words(a), in_words(b), in_words(a - b)
        who, what = pick(NAMES, i), pick(THINGS, i)
        story = f"{who} has {x} {what} and gives {y} of them away. How many are left?"
        match i % 3:
            case 0:
                made.append(chat(story, f"{who} has {left} {what} left."))
            case 1:
                made.append(chat(story, f"{cap(left)}.", system=pick(NUMBER, i // 3)))
            case 2:
                start = f"{who} starts with {x} {what}. Taking away {y} leaves {left}."
                made.append(chat(story, f"{start} So the answer is {left}.", system=pick(WORKING, i // 3)))
    for i in range(14):
        a, b = rng.randint(2, 9), rng.randint(3, 12)
        x, y, product = in_words(a), in_words(b), in_words(a * b)
        what = pick(THINGS, i + 5)
        if i % 2:
            made.append(chat(f"What is {x} times {y}?", f"{cap(x)} times {y} is {product}."))
        else:
            boxes = f"There are {x} boxes with {y} {what} each. How many {what} is that?"
            more = rng.randint(2, 9)
            turns = [boxes, f"{cap(x)} times {y} is {product}, so there are {product} {what}."]
            turns += [f"And if I find {in_words(more)} more?", f"Then you have {in_words(a * b + more)} {what}."]
            made.append(chat(*turns))
    for i in range(8):
        share, people = rng.randint(3, 9), rng.randint(2, 6)
        what = pick(THINGS, i + 2)
        among = "between" if people == 2 else "among"
        ask = f"Share {in_words(share * people)} {what} {among} {in_words(people)} children."
        made.append(chat(ask, f"Each child gets {in_words(share)} {what}."))
    return made


def _add_in_steps(a: int, b: int) -> str:
    x, total = in_words(a), in_words(a + b)
    if b <= 10 or b % 10 == 0:
        return f"Start at {x} and count on {in_words(b)}. You arrive at {total}, so the answer is {total}."
    ten, rest = b - b % 10, b % 10
    first = f"{cap(x)} plus {in_words(ten)} is {in_words(a + ten)}."
    return f"{first} {cap(in_words(a + ten))} plus {in_words(rest)} is {total}. So the answer is {total}."


# ---------------------------------------------------------------------------------------------------------- rewrites

POLITE = table("""
Send me the report now. | Could you please send me the report as soon as you can?
Close the door. | Would you mind closing the door?
You are wrong. | I see it a little differently.
I need an answer today. | I would be grateful for an answer today, if possible.
Move your car. | Could you please move your car a little?
That is too expensive. | I am afraid that is more than I can pay.
Be quiet. | Could you please speak a little more softly?
I do not want to come. | Thank you for asking me, but I would rather stay at home.
Give me the menu. | May I have the menu, please?
Your text is too long. | Your text is interesting, and it would be even better if it were shorter.
Wait outside. | Would you please wait outside for a moment?
Fix this mistake. | Could you please have another look at this part?
""")
SHORTER = table("""
Due to the fact that it was raining, we made the decision to stay at home. | Because it rained, we stayed at home.
At this point in time we do not have any bread left in the shop. | We have no bread left now.
He is a man who is always in the habit of arriving late. | He is always late.
In the event that you have any questions, please do not hesitate to call us. | If you have questions, please call us.
The reason why she left early was that she was feeling tired. | She left early because she was tired.
It is necessary for all of the guests to sign their names in the book. | All guests must sign the book.
We would like to ask you whether it would be possible for you to help us. | Could you help us?
There are many people who are of the opinion that cats are clever. | Many people think that cats are clever.
The meeting will take place on the day of Monday at ten in the morning. | The meeting is on Monday at ten.
During the course of the night the snow came to an end. | The snow stopped in the night.
My brother, who is the younger one of the two, works as a person who bakes bread. | My younger brother is a baker.
She made an attempt to open the window, but was not able to do so. | She could not open the window.
""")
PAST = table("""
I go to school by bus. | I went to school by bus.
She writes a letter to her aunt. | She wrote a letter to her aunt.
We eat soup in the evening. | We ate soup in the evening.
He finds a coin in the street. | He found a coin in the street.
They sing an old song. | They sang an old song.
The train leaves at noon. | The train left at noon.
I see a ship on the lake. | I saw a ship on the lake.
The wind breaks the branch. | The wind broke the branch.
You know the answer. | You knew the answer.
The baker sells brown bread. | The baker sold brown bread.
My friend brings a cake. | My friend brought a cake.
The children swim in the river. | The children swam in the river.
""")
QUESTIONS = table("""
The library opens at nine. | Does the library open at nine?
She can play the violin. | Can she play the violin?
They have seen the film. | Have they seen the film?
It is going to rain. | Is it going to rain?
He lives near the station. | Does he live near the station?
We should bring our own cups. | Should we bring our own cups?
The dog was in the garden. | Was the dog in the garden?
You like strong coffee. | Do you like strong coffee?
The shop will close early. | Will the shop close early?
Their train arrived late. | Did their train arrive late?
""")
FORMAL = table("""
Hey, can't make it tomorrow. | Unfortunately, I am not able to attend tomorrow.
Thanks a lot for the stuff you sent! | Thank you very much for the documents that you sent.
Sorry I'm so late with this. | I apologise for the delay.
We really want to work with you guys. | We would be pleased to work with you.
What's the price? | Could you please tell me the price?
Let me know what you think. | I look forward to hearing your opinion.
The gadget is broken again. | The device has stopped working once more.
Gotta talk about the budget soon. | We should discuss the budget in the near future.
Your offer looks great to us. | Your offer suits us very well.
See you Friday! | I look forward to our meeting on Friday.
""")


def rewrites() -> list[Chat]:
    """The new text with an introduction, or alone where an editor is asked."""
    made = []
    tasks = [
        (POLITE, ("Make this more polite: {}", "Say it in a kinder way: {}"), "Here is a more polite version: {}"),
        (SHORTER, ("Make this sentence shorter: {}", "Say this in fewer words: {}"), "Here is a shorter version: {}"),
        (PAST, ("Put this into the past tense: {}", "Write it as if it were yesterday: {}"), "In the past tense: {}"),
        (QUESTIONS, ("Turn this into a question: {}", "Make a question out of this: {}"), "As a question: {}"),
        (FORMAL, ("Make this more formal: {}", "Rewrite this for a business letter: {}"), "A more formal version: {}"),
    ]
    for table, asks, answer in tasks:
        for i, (before, after) in enumerate(table):
            ask = pick(asks, i).format(before)
            if i % 3 == 2:
                made.append(chat(ask, after, system=pick(EDITOR, i // 3)))
            elif i % 6 == 4:
                follow, next_after = table[(i + 1) % len(table)]
                made.append(chat(ask, answer.format(after), f"Thank you. And this one: {follow}", next_after))
            else:
                made.append(chat(ask, answer.format(after)))
    return made


# ------------------------------------------------------------------------------------------------------------ letters

# Columns: request, subject, to, body, from.
LETTERS = table("""
Ask Mr Brown to move our meeting from Monday to Tuesday. | Our meeting on Monday | Dear Mr Brown | I am sorry, but I
    cannot come on Monday. Would Tuesday at the same time suit you? | Clara Hill
Thank Mrs Green for the lovely dinner. | Thank you for the dinner | Dear Mrs Green | Thank you very much for the
    lovely dinner. We enjoyed the food and, even more, the company. | Paul and Ida
Tell the landlord that the heating does not work. | Heating in flat four | Dear Mr Stone | The heating in my flat has
    not worked since Sunday. Could you please send somebody to repair it? | Leo Marsh
Apologise to a customer for a late parcel. | Your late parcel | Dear Ms Wood | I am sorry that your parcel is late. It
    left our house this morning and will reach you on Thursday. | Emma Reed
Ask the library whether they have a book about bees. | A book about bees | Dear librarian | I am looking for a book
    about keeping bees. Could you tell me whether you have one? | Henry Field
Invite the neighbours to a summer party. | Summer party on Saturday | Dear neighbours | We are having a small party in
    the garden on Saturday at six. It would be lovely to see you there. | Rosa and Sam
Tell a teacher that my son is ill. | Felix is ill | Dear Mrs Lake | My son Felix has a fever and has to stay in bed
    today. Could you please send us his homework? | Grace Miller
Ask a company for a price list. | Your price list | Dear Sir or Madam | We are interested in your garden chairs. Could
    you please send us your price list? | Victor Dean
Say no to a job offer in a friendly way. | Your offer | Dear Ms Carter | Thank you for your kind offer. After careful
    thought I have decided to stay where I am. | Noah West
Remind a friend of the book that I lent her. | My book | Dear Tina | I hope that you liked the book that I lent you in
    May. Could you bring it along on Friday? | Kate
Ask the bank to send a new card. | A new card | Dear Sir or Madam | I have lost my card. Please block it and send a
    new one to the address that you have. | Jonas Frost
Congratulate a colleague on her new job. | Congratulations | Dear Olga | Congratulations on your new job! We will miss
    you here, and we wish you a very good start. | David
Cancel a hotel room. | Please cancel my room | Dear Sir or Madam | I booked a room for two nights in June.
    Unfortunately I cannot travel, so please cancel it. | Mary Cook
Ask the club when the training begins. | Training times | Dear coach | I would like to join the running group. On
    which days does it meet, and when does it begin? | Ben Archer
Tell the team that the office is closed on Friday. | Office closed on Friday | Dear all | The office will be closed
    this Friday because of repairs. Please work from home on that day. | Anna Price
Complain about a broken lamp. | Broken lamp | Dear Sir or Madam | The lamp that I ordered arrived broken. Please send
    me another one or return the money. | Sam Porter
Ask a colleague to read my draft. | Could you read my draft? | Dear Felix | I have finished the first draft of the
    report. Could you read it before Wednesday and tell me what you think? | Rosa
Tell my aunt when my train arrives. | My train on Sunday | Dear Aunt Mary | My train arrives at half past three on
    Sunday. You need not fetch me, as I know the way. | Leo
Ask the town to repair a street light. | Broken street light in Mill Lane | Dear Sir or Madam | The street light at
    number seven, Mill Lane, has been dark for two weeks. Could you please have it repaired? | Ida Walsh
Thank a volunteer for helping at the school fair. | Thank you for your help | Dear Victor | Thank you for your help at
    the school fair. Without you, the cakes would never have been sold. | Tina Ross
""")
# Columns: number of the letter, from 0; what the user asks for next; the body of the new letter.
CHANGES = table("""
1 | Please add that we would like to invite her in May. | Thank you very much for the lovely dinner. We would like to
    return the invitation in May.
4 | Make it about birds instead of bees, please. | I am looking for a book about birds. Could you tell me whether you
    have one?
7 | We want to know the delivery time as well. | We are interested in your garden chairs. Could you please send us
    your price list and tell us how long delivery takes?
10 | Please say that it was stolen. | My card has been stolen. Please block it and send a new one to the address that
    you have.
13 | Please ask about the fee too. | I would like to join the running group. When does it meet, and what is the yearly
    fee?
17 | The train is one hour later. | My train arrives at half past four on Sunday. You need not fetch me, as I know the
    way.
""")


def letters() -> list[Chat]:
    """Polite e-mails, with and without a subject line, some of them changed on request."""
    made = []
    changes = {int(number): (wish, new_body) for number, wish, new_body in CHANGES}
    for i, (request, subject, to, body, sender) in enumerate(LETTERS):
        ask = pick(("Write an e-mail. {}", "{} Please write it as an e-mail.", "Help me with an e-mail. {}"), i)
        letter = f"{to},\n\n{body}\n\nKind regards,\n{sender}"
        if i in changes:
            wish, new_body = changes[i]
            made.append(chat(ask.format(request), letter, wish, letter.replace(body, new_body), system=pick(OFFICE, i)))
        elif i % 3 == 2:
            made.append(chat(ask.format(request), letter, system=pick(OFFICE, i)))
        else:
            made.append(chat(ask.format(request), f"Subject: {subject}\n\n{letter}"))
        if i % 4 == 1:
            made.append(chat(f"Find a subject line for this e-mail: {body}", subject))
    return made


# ------------------------------------------------------------------------------------------------------------- groups

# Columns: group, members.
GROUPS = table("""
fruits | apple | pear | plum | cherry | banana | grape | orange | peach
vegetables | carrot | onion | cabbage | leek | spinach | potato | turnip | radish
tools | hammer | saw | chisel | spade | drill | pliers | rake | wrench
birds | eagle | sparrow | robin | goose | raven | stork | pigeon | gull
musical instruments | violin | flute | drum | trumpet | piano | guitar | harp | cello
pieces of furniture | chair | table | shelf | bed | desk | wardrobe | stool | sofa
items of clothing | shirt | coat | scarf | glove | jacket | dress | sock | hat
vehicles | bus | tram | lorry | bicycle | train | ferry | van | taxi
flowers | rose | tulip | daisy | lily | poppy | violet | iris | daffodil
metals | iron | copper | silver | gold | tin | lead | zinc | nickel
trees | oak | birch | pine | beech | willow | maple | elm | spruce
sports | tennis | rowing | fencing | swimming | judo | hockey | sailing | cycling
""")


def groups(rng: random.Random) -> list[Chat]:
    """Odd ones out, members of a group, and the group of a thing."""
    made = []
    asks = ("Which word does not belong: {}?", "Find the odd one out: {}.", "One of these is different: {}. Which?")
    for i in range(3 * len(GROUPS)):
        group, *members = GROUPS[i % len(GROUPS)]
        _, *others = GROUPS[(i + 3 + 2 * (i // len(GROUPS))) % len(GROUPS)]
        stranger = rng.choice(others)
        shown = [*rng.sample(members, 3), stranger]
        rng.shuffle(shown)
        ask = pick(asks, i).format(", ".join(shown))
        reason = f"{cap(stranger)} does not belong, because the others are {group}."
        made.append(chat(ask, f"{cap(stranger)}.", system=pick(ONE_WORD, i // 3)) if i % 3 == 2 else chat(ask, reason))
    for i, (group, *members) in enumerate(GROUPS):
        few = rng.sample(members, 4)
        wish = pick((f"Name three {group}.", f"Give me three examples of {group}.", f"I need three {group}."), i)
        if i % 2:
            more = f"Thank you, but I need four {group}."
            made.append(chat(wish, f"{cap(listing(few[:3]))}.", more, f"Then add {few[3]}."))
        else:
            numbered = "\n".join(f"{n}. {cap(member)}" for n, member in enumerate(few[:3], 1))
            made.append(chat(wish, numbered, system=pick(LIST, i // 2)))
        thing = rng.choice([member for member in members if member not in few])
        ask = f"What do {few[0]}, {few[1]} and {thing} have in common?"
        made.append(chat(ask, f"They are all {group}."))
    return made


# ---------------------------------------------------------------------------------------------------------- judgements

# Columns: question, answer, reason.
COMPARISONS = table("""
Which is faster, a train or a bicycle? | A train | it has a strong engine
Which is heavier, a litre of water or a litre of oil? | A litre of water | oil is lighter and floats on it
Which is hotter, boiling water or melting ice? | Boiling water | it is at a hundred degrees Celsius and melting ice at
    zero
Which lasts longer, a week or a month? | A month | it has about four weeks
Which is larger, the sun or the earth? | The sun | it is more than a hundred times as wide
Which is closer to us, the moon or the sun? | The moon | the sun is about four hundred times as far away
Which is harder, diamond or chalk? | Diamond | it can scratch almost everything
Which is longer, a metre or a centimetre? | A metre | it has a hundred centimetres
Which travels faster, light or sound? | Light | we see the flash before we hear the thunder
Which is sweeter, a lemon or a ripe banana? | A ripe banana | a lemon is very sour
Which is deeper, a puddle or a lake? | A lake | a puddle is only a little rain on the ground
Which is older, the wheel or the telephone? | The wheel | it was known thousands of years earlier
Which is worth more, a gold ring or a tin ring? | A gold ring | gold is much rarer than tin
Which needs more water, a cactus or a fern? | A fern | a cactus is made for dry places
Which is lighter, a feather or a stone? | A feather | it is thin and full of air
Which comes first in the alphabet, river or road? | River | the letter i comes before the letter o
""")
# Columns: review, verdict, reason.
REVIEWS = table("""
The soup was cold and we waited for an hour. | negative | the guest complains about the soup and the wait
What a wonderful evening, we will come again! | positive | the guest had a good time and wants to return
The room was clean, quiet and full of light. | positive | everything that is said about the room is good
The shoes fell apart after two days. | negative | the shoes broke very soon
I could not put the book down until three in the morning. | positive | the reader found the book exciting
The film was so dull that I fell asleep. | negative | the film was boring
Nobody answered my letters, and I am still waiting for my money. | negative | the customer was left alone
The staff found my lost bag within minutes. | positive | the staff helped quickly
The bread tastes like cardboard. | negative | the taste is compared with something unpleasant
Best bicycle I have ever owned. | positive | the owner likes it more than any other
The concert was worth every coin. | positive | the visitor does not regret the price
The lamp arrived broken, and so did the second one. | negative | two lamps were damaged
My tent stayed dry through a whole night of rain. | positive | the tent did its job
The guide was late and did not know the way. | negative | the guide made two mistakes
""")
# Columns: claim, true or false, the fact.
TRUE_FALSE = table("""
Fish breathe with gills. | true | gills take oxygen out of the water
The sun goes around the earth. | false | the earth goes around the sun
A triangle has four sides. | false | a triangle has three sides
Water boils at a lower temperature on a high mountain. | true | the air presses on it less there
Spiders have six legs. | false | spiders have eight legs
Plants need light to grow. | true | they make their food with the help of light
Winter comes after autumn. | true | the order is spring, summer, autumn, winter
A kilogram of feathers is lighter than a kilogram of iron. | false | both weigh one kilogram
The heart pumps blood through the body. | true | it beats about seventy times a minute
All birds can fly. | false | penguins and ostriches, for example, cannot
Copper conducts electricity well. | true | that is why cables are made of it
February is the longest month. | false | it is the shortest month
Whales are fish. | false | they are mammals and breathe air
Paper is made from wood. | true | the fibres of the wood are pressed into sheets
""")


def judgements() -> list[Chat]:
    """Comparisons, the mood of a review, true and false: with the reason, or in a word or two."""
    made = []
    for i, (question, answer, reason) in enumerate(COMPARISONS):
        if i % 4 == 1:
            made.append(chat(question, f"{answer}.", system=pick(FEW_WORDS, i // 4)))
        elif i % 4 == 3:
            made.append(chat(question, f"{answer}.", f"Why {answer.lower()}?", f"Because {reason}."))
        else:
            made.append(chat(question, f"{answer}, because {reason}."))
    for i, (review, verdict, reason) in enumerate(REVIEWS):
        ask = pick(("Is this review positive or negative? {}", "What is the mood of this review? {}"), i // 2)
        if i % 3 == 1:
            made.append(chat(ask.format(review), f"{cap(verdict)}.", system=pick(ONE_WORD, i // 3)))
        else:
            made.append(chat(ask.format(review), f"It is {verdict}, because {reason}."))
    for i, (claim, truth, fact) in enumerate(TRUE_FALSE):
        ask = pick(("True or false? {}", "Is this right? {}", "I have heard this: {} Is it correct?"), i).format(claim)
        if i % 3 == 2:
            made.append(chat(ask, "Yes." if truth == "true" else "No.", system=pick(ONE_WORD, i // 3)))
        else:
            made.append(chat(ask, f"That is {truth}: {fact}."))
    return made


# ------------------------------------------------------------------------------------------------------------ grammar

# Columns: singular, plural.
PLURALS = table("""
mouse | mice
foot | feet
child | children
tooth | teeth
leaf | leaves
goose | geese
knife | knives
man | men
sheep | sheep
woman | women
wolf | wolves
ox | oxen
city | cities
box | boxes
potato | potatoes
person | people
""")
# Columns: present, past.
VERBS = table("""
buy | bought
catch | caught
choose | chose
drive | drove
fall | fell
feel | felt
fly | flew
forget | forgot
grow | grew
hear | heard
keep | kept
lose | lost
make | made
ride | rode
run | ran
sleep | slept
speak | spoke
teach | taught
throw | threw
""")
LISTS = table("""
tree | apple | moon
river | bread | house
lamp | cloud | ship
queen | dog | field
zebra | winter | garden
music | stone | island
paper | night | engine
yellow | bridge | king
honey | valley | tea
teacher | ladder | forest
uncle | spoon | market
castle | rain | ink
""")


def grammar() -> list[Chat]:
    """Plurals, past tenses, the order of the alphabet and the number of letters."""
    made = []
    for i, (one, many) in enumerate(PLURALS):
        ask = pick((f'What is the plural of "{one}"?', f'One {one}, two what? Give me the plural of "{one}".'), i)
        if i % 4 == 2:
            made.append(chat(ask, f"{cap(many)}.", system=pick(ONE_WORD, i // 4)))
        elif i % 4 == 3:
            other, others = PLURALS[(i + 6) % len(PLURALS)]
            turns = (ask, f'The plural is "{many}".', f'And the plural of "{other}"?', f'That is "{others}".')
            made.append(chat(*turns))
        else:
            made.append(chat(ask, f'The plural of "{one}" is "{many}".'))
    for i, (now, before) in enumerate(VERBS):
        ask = pick((f'What is the past tense of "{now}"?', f"Today I {now}. What did I do yesterday?"), i)
        if i % 4 == 0:
            made.append(chat(ask, f"{cap(before)}.", system=pick(ONE_WORD, i // 4)))
        else:
            made.append(chat(ask, f"Yesterday you {before}." if i % 2 else f'The past tense of "{now}" is "{before}".'))
    for i, items in enumerate(LISTS):
        shown, ordered = ", ".join(items), sorted(items)
        ask = pick(("Put these words in alphabetical order: {}.", "Sort these words from a to z: {}."), i).format(shown)
        if i % 3 == 1:
            numbered = "\n".join(f"{n}. {cap(item)}" for n, item in enumerate(ordered, 1))
            made.append(chat(ask, numbered, system=pick(LIST, i // 3)))
        elif i % 3 == 2:
            first = f"Which of {listing(items)} has the most letters?"
            longest = max(items, key=len)
            count = in_words(len(longest))
            made.append(chat(ask, f"{cap(', '.join(ordered))}.", first, f'"{cap(longest)}", with {count} letters.'))
        else:
            made.append(chat(ask, f"{cap(', '.join(ordered))}."))
    return made


# ---------------------------------------------------------------------------------------------- jobs, tools, the world

JOBS = table("""
a baker | makes bread and cakes | early in the morning
a nurse | looks after people who are ill | in a hospital
a carpenter | builds things out of wood | in a workshop
a pilot | flies aeroplanes | in the cockpit
a librarian | looks after books and helps readers | in a library
a farmer | grows food and keeps animals | on a farm
a judge | decides cases by the law | in a court
a plumber | repairs pipes and taps | in many houses
a tailor | makes and mends clothes | with needle and thread
a vet | treats sick animals | in a surgery
an architect | plans houses | at a large desk
an astronomer | studies the stars | with a telescope
a translator | turns texts into another language | at a desk
a gardener | takes care of plants | in the open air
a conductor | leads an orchestra | with a small stick
a cobbler | repairs shoes | in a small shop
""")
TOOLS = table("""
a hammer | driving nails into wood
a ladder | reaching high places
a compass | finding north
a kettle | boiling water
a thermometer | measuring temperature
a rake | gathering fallen leaves
a needle | sewing cloth
a microscope | seeing very small things
an anchor | holding a ship in place
a sieve | separating fine flour from lumps
an umbrella | keeping off the rain
a scale | weighing things
a telescope | seeing things that are far away
a lock | keeping a door shut
a spade | digging the ground
a calendar | keeping track of the days
""")
# Columns: question, few words, full sentence, one more fact.
WORLD = table("""
How many minutes are in an hour? | Sixty | An hour has sixty minutes. | A whole day has one thousand four hundred and
    forty.
How many days are in a week? | Seven | A week has seven days. | A year has fifty-two weeks and one or two days more.
How many months have thirty-one days? | Seven | Seven months have thirty-one days. | Four months have thirty days.
How many legs does an insect have? | Six | An insect has six legs. | Its body has three parts.
How many sides does a hexagon have? | Six | A hexagon has six sides. | The cells of a honeycomb are hexagons.
How many grams are in a kilogram? | A thousand | A kilogram has a thousand grams. | A thousand kilograms are a tonne.
How many players are in a football team? | Eleven | A football team has eleven players on the field. | One of them is
    the goalkeeper.
Which planet is closest to the sun? | Mercury | Mercury is the planet closest to the sun. | A year there lasts only
    eighty-eight of our days.
Which planet is the largest? | Jupiter | Jupiter is the largest planet of the solar system. | It is made mostly of
    gas.
Which planet is known for its bright rings? | Saturn | Saturn is known for its bright rings. | They are made of ice
    and rock.
Which planet is called the red planet? | Mars | Mars is called the red planet. | Its colour comes from rust in the
    ground.
Which gas do we need to breathe? | Oxygen | We need oxygen to breathe. | It makes up about a fifth of the air.
Which gas do plants take in from the air? | Carbon dioxide | Plants take in carbon dioxide. | They give off oxygen in
    return.
At what temperature does water freeze? | Zero degrees Celsius | Water freezes at zero degrees Celsius. | Salt water
    freezes a little lower.
Which is the largest ocean? | The Pacific | The Pacific is the largest ocean. | It is larger than all the land
    together.
Which is the highest mountain above sea level? | Mount Everest | Mount Everest is the highest mountain above sea
    level. | It stands between Nepal and China.
Which organ pumps the blood? | The heart | The heart pumps the blood through the body. | It is a strong muscle about
    the size of a fist.
Which organ do we think with? | The brain | We think with the brain. | It uses about a fifth of the energy of the
    body.
What do lungs do? | Take in oxygen | The lungs bring oxygen into the blood. | They also let carbon dioxide out.
What is glass made of? | Mostly sand | Glass is made mostly of sand that has been melted. | Old glass can be melted
    again and again.
What is paper made of? | Wood fibres | Paper is made of wood fibres. | Old paper can be used to make new paper.
Where does wool come from? | Sheep | Most wool comes from sheep. | A sheep is usually shorn once a year.
Where does silk come from? | Silkworms | Silk comes from the cocoons of silkworms. | One cocoon gives hundreds of
    metres of thread.
What is the first month of the year? | January | January is the first month of the year. | It has thirty-one days.
Which season comes before summer? | Spring | Spring comes before summer. | Many plants begin to flower then.
In which direction does the sun rise? | In the east | The sun rises in the east. | It sets in the west.
Which colours do you mix to get green? | Blue and yellow | You get green by mixing blue and yellow paint. | Red and
    yellow give orange.
What do you call a person who writes poems? | A poet | A person who writes poems is called a poet. | A person who
    writes plays is a playwright.
""")


def world() -> list[Chat]:
    """Jobs, tools and general knowledge."""
    made = []
    for i, (who, does, how) in enumerate(JOBS):
        ask = pick((f"What does {who} do?", f"Describe the work of {who}.", f"What is the job of {who}?"), i)
        if i % 4 == 1:
            made.append(chat(ask, f"{cap(who)} {does}.", f"And where does {who} work?", f"Usually {how}."))
        elif i % 4 == 2:
            made.append(chat(ask, f"{cap(who)} {does}, usually {how}."))
        elif i % 4 == 3:
            made.append(chat(ask, f"{cap(who)} {does}.", system=pick(SHORT, i // 4)))
        else:
            made.append(chat(f"Who {does}?", f"{cap(who)} does."))
    for i, (tool, use) in enumerate(TOOLS):
        ask = pick((f"What is {tool} used for?", f"What do I need {tool} for?", f"Why would I buy {tool}?"), i)
        if i % 3 == 1:
            made.append(chat(ask, f"For {use}.", system=pick(FEW_WORDS, i // 3)))
        elif i % 3 == 2:
            made.append(chat(f"Which thing is good for {use}?", f"You can use {tool} for {use}."))
        else:
            made.append(chat(ask, f"{cap(tool)} is used for {use}."))
    for i, (question, few, full, fact) in enumerate(WORLD):
        match i % 4:
            case 0:
                made.append(chat(question, full))
                start = pick(("Ask me a question.", "I am ready to play.", "Test me, please."), i // 4)
                made.append(chat(start, question, f"{few}.", f"That is right! {full}", system=pick(QUIZ, i // 4)))
            case 1:
                made.append(chat(question, f"{few}.", system=pick(FEW_WORDS, i // 4)))
            case 2:
                made.append(chat(question, f"{full} {fact}", system=pick(ONE_MORE, i // 4)))
            case 3:
                made.append(chat(question, f"{few}! Would you like another one?", system=pick(QUIZ, i // 4)))
                made.append(chat(f"A quick question. {question}", full))
    return made


# ----------------------------------------------------------------------------------------------------------- summaries

# Columns: text, summary, a question about it, its answer.
TEXTS = table("""
The village had no bridge, so people crossed the river in a small boat. Last year everyone gave a little money, and
    now there is a bridge of stone. | The people of a village paid together for a stone bridge. | How did people cross
    the river before? | They crossed it in a small boat.
Mia wanted to learn the piano, but her family had no room for one. A neighbour let her play on his every afternoon.
    Today she gives concerts. | Thanks to a neighbour's piano, Mia became a pianist. | Where did Mia practise? | She
    practised at a neighbour's house.
Our school now starts at nine instead of eight. The pupils sleep longer, and the teachers say that they listen better
    in the first lesson. | Since school starts later, the pupils listen better. | When does school start now? | It
    starts at nine.
The old cinema was to be pulled down. Hundreds of people signed a letter to the mayor. In the end the town bought the
    house, and films are shown there again. | A letter signed by hundreds of people saved the old cinema. | Who bought
    the cinema? | The town bought it.
A storm broke the roof of the barn in the night. In the morning the neighbours came with ladders and boards, and by
    the evening the roof was whole again. | Neighbours repaired the barn's roof in one day. | What broke the roof? | A
    storm broke it.
Tom forgot his lunch every Monday. His sister tied a red ribbon to his bag to remind him. He has not forgotten it
    since. | A red ribbon helps Tom to remember his lunch. | What did Tom forget? | He forgot his lunch.
The bakery threw away what it had not sold in the evening. Now it gives the bread to a kitchen for the poor, which
    feeds sixty people with it. | The bakery now gives its unsold bread to the poor. | How many people get a meal? |
    Sixty people do.
Two friends walked along the coast for ten days. It rained on eight of them. They still say that it was the best
    holiday of their lives. | Two friends loved their walk along the coast in spite of the rain. | On how many days
    did it rain? | It rained on eight days.
The museum has a new lift and wide doors. Visitors in wheelchairs can now reach all of its floors, and they no longer
    have to use the back entrance. | The museum is now open to visitors in wheelchairs. | What is new in the museum? |
    It has a new lift and wide doors.
Bees had become rare in the valley. The farmers sowed flowers along their fields and stopped spraying in spring. After
    three years the bees were back. | The farmers brought the bees back with flowers and less spraying. | How long did
    it take? | It took three years.
Grandmother never used a recipe. When she was eighty, Nora watched her cook for a whole month and wrote everything
    down. The family still cooks from that book. | Nora wrote her grandmother's recipes down for the family. | How old
    was the grandmother? | She was eighty.
The last bus left at eight, so young people could not go to the theatre. Now there is a bus at eleven, and it is full
    every Saturday. | A later bus lets young people go to the theatre. | When does the last bus leave now? | It leaves
    at eleven.
Jack repaired old radios in his cellar. One day a collector paid him more for one of them than he earned in a month.
    Jack gave up his job and opened a shop. | Jack turned his hobby of repairing radios into a shop. | Who bought the
    expensive radio? | A collector bought it.
The lake froze early this year. The mayor forbade people to walk on it, but a boy fell through the ice. Two fishermen
    pulled him out with a ladder. | Two fishermen saved a boy who fell through the ice. | What did the fishermen use?
    | They used a ladder.
Lena could not decide between two jobs. She wrote down what she liked about each of them. The list for the smaller
    company was twice as long, so she went there. | Lena chose the smaller company with the help of a list. | Which
    company did Lena choose? | She chose the smaller company.
A stray dog slept in front of the station all winter. The people who worked there fed it and gave it a blanket. Now it
    lives with the woman who sells the tickets. | A stray dog from the station found a home. | Where did the dog sleep
    in winter? | It slept in front of the station.
""")


def summaries() -> list[Chat]:
    """Short texts: their point in a sentence, a title, a question about them."""
    made = []
    for i, (text, summary, question, answer) in enumerate(TEXTS):
        ask = pick((f"Summarise this text in one sentence: {text}", f"What is the main point of this story? {text}"), i)
        match i % 3:
            case 0:
                made.append(chat(f"Read this and answer. {text} {question}", answer))
                made.append(chat(f"Please read this: {text}", "I have read it.", f"Good. {question}", answer))
            case 1:
                made.append(chat(ask, summary, f"One more question. {question}", answer))
            case 2:
                made.append(chat(f"{text} {question}", answer, system=pick(SHORT, i // 3)))
                made.append(chat(ask, summary))
    return made


# -------------------------------------------------------------------------------------------------------------- advice

# Columns: question, advice, what the user says next, advice.
ADVICE = table("""
I cannot fall asleep at night. What can I do? | Go to bed at the same time every day and put the phone in another
    room. | And if I wake up in the night? | Stay in the dark, breathe slowly and do not look at the clock.
How can I read more books? | Keep a book beside your bed and read ten pages every evening. | Which book should I begin
    with? | Take a thin one about something that you already like.
How do I save money? | Put a fixed part aside on the day when you are paid, before you spend anything. | How large
    should that part be? | Begin with a tenth, and raise it when you can.
How can I learn new words in a language? | Learn ten words a day and use each of them in a sentence. | Should I write
    them down? | Yes, on small cards that you can carry with you.
I want to drink more water. | Keep a full glass on your desk and fill it again whenever it is empty. | I do not like
    plain water. | Put a slice of lemon or some mint in it.
I feel lonely in the new town. | Join a club for something that you like and go there every week. | I am rather shy. |
    Then choose something where one works side by side, such as a choir or a garden.
My plants keep dying. What am I doing wrong? | Most plants die of too much water, so wait until the soil is dry. |
    What about the light? | Most of them like a bright place without hot sun.
What should I write in a birthday card? | Name one thing that you like about the person and one wish for the year. |
    It is for my boss. | Then keep it short: thank her for her trust and wish her a happy year.
I made a mistake at work. Should I tell my boss? | Yes, tell her early and say how you will put it right. | What if
    she is angry? | Listen calmly, repeat your plan, and do what you promised.
""")
# Columns: question, advice, encouragement.
COACHING = table("""
I always forget names. Do you have a tip? | Say the name aloud when you hear it and link it to a picture. | With a
    little practice you will be good at it.
I am nervous about a job interview. | Practise your answers with a friend and prepare two questions of your own. |
    They invited you because they liked what they read.
My room is always a mess. Help! | Give each thing a fixed place and tidy up for ten minutes before bed. | You will be
    proud of it by Sunday.
I had a quarrel with my best friend. | Call her, say that you are sorry, and listen to her side. | Good friendships
    survive a quarrel.
How do I stop putting things off? | Start with five minutes of the smallest task and set a clock. | The first step is
    the hardest, and you can take it.
How can I speak better in front of people? | Practise aloud, speak slowly and look at one friendly face. | Each talk
    will be easier than the one before.
How do I start running? | Run for one minute, walk for two, and do this ten times, three days a week. | In two months
    you may run for half an hour.
How can I be more patient with my children? | Take three slow breaths before you answer, and speak softly. | That you
    ask shows how much you care.
How can I cook more at home? | Plan three simple meals on Sunday and buy everything for them at once. | Soon you will
    have dishes of your own.
""")


def advice() -> list[Chat]:
    """Everyday advice, alone, with a further question, or from a coach."""
    made = []
    for i, (question, tip, more, further) in enumerate(ADVICE):
        made.append(chat(question, tip, more, further) if i % 3 else chat(question, tip))
    for i, (question, tip, cheer) in enumerate(COACHING):
        made.append(chat(question, f"{tip} {cheer}", system=pick(COACH, i)))
    return made


# --------------------------------------------------------------------------------------------------------------- talks

TALKS = table("""
Hello! | Hello! How can I help you today? | I need a name for my kitten. It is grey. | How about Smoky, Misty or
    Pebble? | I like Misty. | A lovely choice. Welcome home, Misty!
I have eggs, milk and flour. What can I make? | You can make pancakes. | I have no milk after all. | Then use water
    instead. The pancakes will be a little thinner.
What shall I give my father for his birthday? | What does he like to do? | He works in the garden a lot. | Then a good
    pair of gloves or a small pear tree would please him.
Can you recommend a hobby? | Do you prefer to be indoors or outdoors? | Outdoors, and not too expensive. | Try
    watching birds. All you need is time, a small book and good eyes.
I lost my keys. | Where did you have them last? | In the kitchen, I think. | Then look on the table, in your coat and
    in the bin. Keys like to hide there.
Is it going to rain tomorrow? | I cannot see the weather, so I do not know. | What would you do? | I would take a
    small umbrella. It is light, and you stay dry.
Write a line for a get-well card. | Get well soon, we miss your laugh! | A little more formal, please. | We wish you a
    full and quick recovery.
Give me a riddle. | What has hands but cannot clap? | A clock? | Yes, a clock. Well done!
Give me an easy riddle for children. | What gets wetter the more it dries? | I give up. | A towel.
Which train should I take, the one at eight or the one at nine? | When do you have to be there? | At ten, and it takes
    ninety minutes. | Then take the one at eight. The later one would arrive at half past ten.
I would like to learn the guitar. | A fine plan. Do you have a guitar already? | Yes, an old one. | Then have it
    tuned, learn three chords, and play for ten minutes every day.
How do you spell the colour of snow? | White: w, h, i, t, e. | And the colour of coal? | Black: b, l, a, c, k.
What is a good title for a story about a lonely lighthouse? | The Last Light on the Coast. | It should sound happier.
    | A Light for Everyone.
I want to thank my teacher. | What did she do for you? | She helped me with maths for a year. | You could write: Thank
    you for a year of patience. Thanks to you, I like maths now.
Can you help me with a packing list for the beach? | Of course: a towel, a hat, water, sun cream and a book. | We have
    a baby with us. | Then add a sunshade, spare clothes and a bottle for the baby.
My tea is too bitter. | Let it stand for a shorter time, or use cooler water. | How long is right? | Three minutes are
    enough for most black teas.
What can I do on a rainy Sunday? | Bake bread, read a novel or write to an old friend. | I have two small children
    here. | Then build a cave out of chairs and blankets, and read stories in it.
Tell me a very short story. | A boy planted a coin. Nothing grew, but he met the neighbour who watched him dig. | What
    happened then? | They planted an apple tree together, and they shared the apples every autumn.
Please check my sentence: He go to school. | It should be: He goes to school. | Why? | With he, she and it, the verb
    takes an s in the present tense.
Please check this: I have saw the film. | It should be: I have seen the film. | What is the rule? | After have or has,
    use the past participle, which is seen.
Who are you? | I am a small language model. I can answer simple questions. | Do you make mistakes? | Yes, often.
    Please check anything that is important.
Convert two hours into minutes. | Two hours are one hundred and twenty minutes. | And three hours? | Three hours are
    one hundred and eighty minutes.
Good morning! I slept badly. | I am sorry to hear that. Was it noisy? | Yes, the neighbours had a party. | Then rest a
    little after lunch, and ask them kindly to tell you next time.
Which word is better, big or large? | Both are right. Large is a little more formal. | I am writing to my bank. | Then
    use large.
I am thirsty but I have no money with me. | Many towns have fountains with drinking water. | There is none here. |
    Then ask in a cafe for a glass of tap water. Most people are glad to help.
How far can I walk in two hours? | About eight to ten kilometres on a flat road. | And in the mountains? | Rather half
    of that, because the climbing takes time.
Count from five down to one. | Five, four, three, two, one. | Now only the odd ones. | Five, three, one.
My brother is two years older than I am. I am nine. | Then your brother is eleven. | How old will he be when I am
    twelve? | He will be fourteen.
We are four people and have one large pizza. | Cut it into eight pieces, then everyone gets two. | My sister does not
    want any. | Then cut it into six pieces, and each of you three gets two.
Say something nice about Mondays. | A Monday is a fresh page for a whole week. | That is good. Now about rain. | Rain
    washes the streets and makes the gardens green.
""")


def talks() -> list[Chat]:
    """Short conversations in which the answer depends on what was said before."""
    return [chat(*turns) for turns in TALKS]


# ------------------------------------------------------------------------------------------------------------ the files


def build() -> tuple[list[Chat], list[Chat]]:
    """All conversations, split into training and test: the same share of every kind, no test question in training."""
    rng = random.Random(SEED)
    kinds = [
        countries(), animals(), words(), explanations(), how_tos(), sums(rng), rewrites(), letters(), groups(rng),
        judgements(), grammar(), world(), summaries(), advice(), talks(),
    ]  # fmt: skip
    asked = Counter(question for kind in kinds for example in kind for question in _questions(example))
    total = sum(len(kind) for kind in kinds)
    train, test, seen = [], [], 0
    for kind in kinds:
        # Only what is asked nowhere else can be a test question.
        unique = [n for n, example in enumerate(kind) if all(asked[question] == 1 for question in _questions(example))]
        seen += len(kind)
        chosen = set(rng.sample(unique, TEST_EXAMPLES * seen // total - len(test)))
        train += [example for n, example in enumerate(kind) if n not in chosen]
        test += [example for n, example in enumerate(kind) if n in chosen]
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def _questions(example: Chat) -> list[str]:
    return [message["content"] for message in example["messages"] if message["role"] == "user"]


def main() -> None:
    """Write both files and say what is in them."""
    for name, examples in zip(("train", "test"), build(), strict=True):
        lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
        (FOLDER / f"{name}.jsonl").write_bytes("".join(lines).encode())
        turns = [len(_questions(example)) for example in examples]
        systems = sum(example["messages"][0]["role"] == "system" for example in examples)
        multi = sum(count > 1 for count in turns)
        print(f"{name}: {len(examples)} conversations, {multi} of several turns, {systems} with a system message")


if __name__ == "__main__":
    main()
