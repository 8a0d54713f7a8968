"""The words and topics of the built-in task, in three parts: to fit on, to choose between fits on, to judge on.

Invariant (tests/test_instructions.py): no required word, no topic and no content word of a topic stands in two parts,
and no required word stands in a topic. The words are plain nouns, so that a small model can use them.
"""


def _words(text: str) -> list[str]:
    return text.split()


def _topics(text: str) -> list[str]:
    return [topic for line in text.strip().splitlines() for topic in line.split(", ")]


TRAIN_WORDS = _words("""
river mountain bicycle garden window teacher dragon coffee winter kitchen planet rabbit mirror forest pencil island
tiger guitar bridge camera market castle doctor button candle ocean farmer violin jacket engine rocket basket lemon
turtle feather ladder pillow needle saddle tunnel apple barn blanket bottle bucket cabin canoe carrot cellar chalk
cheese cliff compass copper cousin curtain desk diamond dolphin donkey drum eagle envelope fence flute fountain fox
giraffe glove goat hammer harbor hat honey horse jar jungle kettle king kite lamp letter lizard magnet meadow medal
monkey moon mushroom nest notebook onion orange oven owl
""")

VALIDATION_WORDS = _words("""
panda parrot peach pebble penguin pepper piano pigeon pirate potato puppet pyramid queen radio ribbon robot rope sailor
scarf shark shelf ship shovel silver
""")

HELD_OUT_WORDS = _words("""
snow soap soldier spider spoon squirrel stable stamp statue stone stove suitcase sunset swan sword table tailor tea
telescope temple thunder ticket tomato torch tower trumpet umbrella uncle valley vase village volcano wagon wallet
walnut whale wheel whistle wizard wolf anchor ankle armchair arrow aunt backpack bakery balcony balloon banana beaver
beetle bell berry biscuit boot bowl bracelet branch brick broom butterfly cactus cage cake camel canyon carpet cave
chain chair cherry chimney clock cloud coconut coin crab crown cup deer dentist duck elephant emerald falcon flag
flower fork frog gate ghost goose grape hedgehog helmet hill hotel insect ivory jewel judge kangaroo key knife lake
leaf lion lobster lock map marble mask
""")

TRAIN_TOPICS = _topics("""
music, the sea, a school day, cooking dinner, a long walk, an old house, space travel, friendship, a rainy morning
a small town, learning to swim, a birthday party, the desert, a train ride, a stolen purse, painting, a busy street
sleep, a football match, the weather, a visit to the museum, healthy food, growing up, a job interview
the solar system, a wedding, a camping trip, a broken bone, modern art, a playful puppy, the history of writing
a traffic jam, saving money, public libraries, a noisy neighbor, the night sky, a family photo, running a marathon
home repair, a secret diary, computers, a bedtime story, the circus, baking bread, an ancient empire, a science fair
recycling, a haircut, gym class, a power outage, the stock exchange, a spelling contest, chess, a mystery novel
breakfast, a hospital visit, fishing, the rainforest, dancing, a school bus, a surprise guest, magic tricks
a job well done, a heat wave, poetry, yoga, an airport delay, a flat tire, watching birds, the alphabet
a dream vacation, a grocery list, old newspapers, the first day of spring
""")

VALIDATION_TOPICS = _topics("""
a snowman, homework, the color blue, a video game, an earthquake, a picnic, laundry, road safety, a thank you note
knitting, a tame animal, the theater, a phone call, eyesight, the number seven, a hot lunch, a microscope, jogging
a sailing race, a barber shop, pottery, a summer storm
""")

HELD_OUT_TOPICS = _topics("""
astronomy, the beach, a college lecture, making soup, an evening stroll, a haunted mansion, factories at work
loneliness, a foggy afternoon, a big city, truck driving, a graduation ceremony, the north pole, an airplane flight
a missing cat, photography, a quiet alley, insomnia, a tennis tournament, climate change, a zoo tour, vitamins
childhood, a monthly paycheck, black holes, an anniversary, a hiking adventure, a sprained wrist, sculpture
an adopted kitten, the invention of printing, the subway, paying taxes, bookstores, a friendly stranger
shooting stars, a veterans reunion, lifting weights, plumbing, a hidden treasure, smartphones, a fairy tale, comedy
roasting vegetables, a vanished civilization, a chemistry experiment, plastic waste, a fancy outfit, water polo
a blackout, a startup business, a talent competition, board games, a detective film, brunch, a pharmacy, surfing
coral reefs, ballet, a taxi, a tourist, card collecting, teamwork, a drought, rhyme, meditation, a missing package
car insurance, wild bees, mathematics, a weekend getaway, shopping, ice hockey, an exam, autumn, an online course
a flood, a barbecue, antique furniture, dish washing, fire drills, an apology, sewing, beekeepers, opera, an email
hearing, geometry, a sandwich, a physics professor, cycling, a regatta, the last week of december, a beauty salon
glass blowing, lightning
""")
