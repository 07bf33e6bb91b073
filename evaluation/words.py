"""Common English words for made texts: the published RULER takes its own from the package wonderwords."""

# ruff: noqa: SIM905 (a list of words is read more easily as words)
from __future__ import annotations

NOUNS = tuple(
    """
    acorn actor airport album alley almond anchor angle ankle anthem apple apron arch arrow artist atlas attic autumn
    badge bakery balcony ballad bamboo banana bandage banner barley barn barrel basin basket battery beach beacon bean
    beaver bedroom beetle bell bench berry bicycle biscuit blanket blossom boat bonfire bookcase boot border bottle
    boulder bowl branch brass bread brick bridge broom brush bucket buffalo builder bulb bundle button cabbage cabin
    cable cactus cake camel camera canal candle cannon canoe canvas canyon captain caravan cargo carpet carrot cart
    castle cathedral cavern cedar ceiling cellar cement ceremony chair chalk channel chapel chariot cheese cherry chest
    chimney cinema circle circus clay cliff climate clock cloth cloud clover coach coast cobbler coffee coin collar
    comet compass concert copper coral corner cottage cotton cousin cradle crane crater crayon creek cricket crown
    crystal cupboard curtain cushion dagger daisy dancer dentist desert diamond diary dinner doctor dolphin donkey
    dragon drawer drum eagle easel echo elbow elephant emerald engine envelope evening fabric factory falcon farmer
    feather fence ferry festival fiddle field finger flag flame flask flute forest fossil fountain fox frame freezer
    frog furnace galaxy gallery garage garden garlic gate ginger giraffe glacier glass glove goblet gorge granite grape
    gravel guitar hammer hammock harbor harvest hazel hedge helmet heron hill honey horizon hospital hotel island ivory
    jacket jasmine jewel journal judge juice jungle kettle kitchen kite ladder lagoon lake lamp lantern lawyer leaf
    leather lemon letter library lighthouse lilac lion lizard lobster locket lumber machine magnet mango maple marble
    market meadow medal melon meteor mirror monkey morning mountain museum mushroom napkin needle nephew notebook nugget
    oasis ocean office olive onion orange orchard organ otter oven owl oyster paddle paint palace panther paper parade
    parcel parrot pasture pear pebble pelican pencil pepper piano pickle pigeon pillow pilot pirate planet plaza plum
    pocket pond poppy porch potato prairie prince pumpkin puppet puzzle quarry quilt rabbit radio raft railway rainbow
    ranch raven ribbon river robin rocket roof rope rose saddle sailor salad salmon sandal saucer scarf school scooter
    sculpture seed shadow shark shelf shepherd shield shovel silver singer skeleton sleeve snail soap sparrow spider
    spoon squirrel stable staircase statue station steam storm stove straw stream street sugar summer sunset swallow
    sword table tailor teapot temple tent theater thimble thistle thunder ticket tiger timber toast tomato tower tractor
    trail treasure trumpet tulip tunnel turtle twig umbrella uncle valley vase velvet village vinegar violin volcano
    wagon walnut walrus waterfall whale wheat whistle widow willow window winter wizard wolf woodpecker yogurt zebra
    """.split()
)
ADJECTIVES = tuple(
    """
    able ancient angry awake bitter bold brave brief bright broad broken busy calm careful cheap clean clever cloudy
    cold common cosy crisp curious curly dark deep dusty eager early easy elegant empty endless equal exact faint fair
    famous fancy fast fierce final firm flat fragile free fresh frozen gentle giant glad golden graceful grand grateful
    heavy hidden hollow honest huge humble hungry icy idle jolly keen kind large late lazy light little lively lonely
    loud loyal lucky mellow merry mighty modern narrow neat new noble noisy odd old open pale patient plain polite proud
    pure quick quiet rapid rare ready rich ripe rough round royal rusty sad safe scarce secret sharp shiny short shy
    silent simple sleepy slim slow small smooth soft solid sour spare steady steep sticky strange strict strong sudden
    sunny sweet swift tall tame tender thick thin tidy tiny tired tough vast vivid warm weak wide wild wise witty young
    """.split()
)
