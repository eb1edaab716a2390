"""Units of measure in one spelling: "meters per second squared", "m/s^2" and "m s^{-2}" are "m s^-2".

Nothing is converted: 100 cm is not 1 m here, as a question may ask for one of the two.
"""

import re

from vigos_jax.grading.numbers import leading_number

_MAX_CHARS = 60
# A line: the canonical spelling, then the others. Looked up in lower case.
_TABLE = """
m meter meters metre metres 米
cm centimeter centimeters centimetre centimetres 厘米
mm millimeter millimeters millimetre millimetres
km kilometer kilometers kilometre kilometres kms 千米 公里
dm decimeter decimeters decimetre decimetres
μm micrometer micrometers micrometre micrometres micron microns um
nm nanometer nanometers nanometre nanometres
in inch inches "
ft foot feet '
yd yard yards yds
mi mile miles
g gram grams gramme grammes gm 克
kg kilogram kilograms kilogramme kilogrammes kilo kilos kgs 千克 公斤
mg milligram milligrams
μg microgram micrograms ug
t ton tons tonne tonnes
lb lbs
pound pounds
oz ounce ounces
s sec secs second seconds 秒
ms millisecond milliseconds
μs microsecond microseconds us
ns nanosecond nanoseconds
min mins minute minutes 分钟
h hr hrs hour hours 小时
day days d 天
week weeks wk wks
month months
year years yr yrs 年 岁
° deg degs degree degrees 度
°c celsius centigrade c
°f fahrenheit
k kelvin kelvins
rad radian radians rads
ha hectare hectares
acre acres
l liter liters litre litres
ml milliliter milliliters millilitre millilitres
cl centiliter centiliters centilitre centilitres
gal gallon gallons
n newton newtons
kn kilonewton kilonewtons
pa pascal pascals
kpa kilopascal kilopascals
atm atmosphere atmospheres
bar bars
j joule joules
kj kilojoule kilojoules
cal calorie calories
kcal kilocalorie kilocalories
ev electronvolt electronvolts
w watt watts
kw kilowatt kilowatts
v volt volts
mv millivolt millivolts
kv kilovolt kilovolts
a amp amps ampere amperes
ma milliamp milliamps milliampere milliamperes
ω ohm ohms
kω kilohm kilohms kiloohm kiloohms
hz hertz
khz kilohertz
mhz megahertz
ghz gigahertz
mol mole moles mols
coulomb coulombs
farad farads
μf microfarad microfarads
tesla teslas
db decibel decibels
byte bytes
kb kilobyte kilobytes
mb megabyte megabytes
gb gigabyte gigabytes
tb terabyte terabytes
px pixel pixels
rpm
% percent pct percentage
$ dollar dollars usd us$ buck bucks
¢ cent cents
€ euro euros eur
£ gbp
¥ 元 円
yen jpy
yuan rmb cny
₹ rupee rupees inr rs
₩ won krw
₽ ruble rubles rouble roubles rub
units unit 个 只 条 张 本 名 位 辆 棵 朵 件 支
"""
_CANONICAL = {name: line.split()[0] for line in _TABLE.split("\n") for name in line.split()}
_MEGA = {"MW": "megawatt", "MPa": "megapascal", "MJ": "megajoule", "MN": "meganewton", "MV": "megavolt", "MΩ": "megohm"}
_CASED = _MEGA | {"mW": "milliwatt", "mPa": "millipascal", "mJ": "millijoule", "mN": "millinewton", "mHz": "millihertz"}
_CASED |= {f"{name}{s}": name for name in {**_CASED}.values() for s in ("", "s")}
# One spelling that stands for several units.
_AMBIGUOUS = {"pound": ("lb", "£"), "¥": ("yen", "yuan")}
CURRENCY = re.compile(r"(?:US)?([$€£¥₹₩₽]) ?")

_PHRASES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\bper cent\b", "percent"),
        (r"(?:\bdegrees? |\bdeg\.? |° ?)(?:celsius|centigrade|c)\b", "°c"),
        (r"(?:\bdegrees? |\bdeg\.? |° ?)(?:fahrenheit|f)\b", "°f"),
        (r"\b(?:us|u\.s\.|american) dollars?\b", "$"),
        (r"\b([kmg]?w)h\b", r"\1 h"),
        (r"\bmph\b", "mi/h"),
        (r"\b(?:kph|kmh|kmph)\b", "km/h"),
        (r"\\(?:cdot|times)|\*|-(?=[a-z])", " "),
        (r"\b(?:square|sq\.?) (\S+)", r"\1^2"),
        (r"\b(?:cubic|cu\.?) (\S+)", r"\1^3"),
        (r" squared\b", "^2"),
        (r" cubed\b", "^3"),
        (r"\bcc\b", "cm^3"),
        (r"\bper\b", "/"),
        (r"\{ ?(-?[0-9]) ?\}", r"\1"),
    )
)
_ATOM = re.compile(r"(?P<slash>/?) ?(?P<name>[^\W\d_]+|°[cf]?|[\"'%$¢€£¥₹₩₽])\.?(?:\^? ?(?P<power>-?[1-9]))? ?")

_UNIT_PART = re.compile(r"([^0-9]{1,30}?)(?:,? and|,)? ?(?=[0-9]|$)")


def unit_of(text: str) -> str | None:
    """The canonical spelling of a unit, "" for the bare word "units"; None if it is not one."""
    text = text.strip()
    if not text or len(text) > _MAX_CHARS:
        return None
    if text in _CASED:
        return _CASED[text]
    text = text.casefold()
    for pattern, new in _PHRASES:
        text = pattern.sub(new, text)
    text = " ".join(text.split())
    powers: dict[str, int] = {}
    place = 0
    while place < len(text):
        atom = _ATOM.match(text, place)
        name = _CANONICAL.get(atom["name"]) if atom else None
        if atom is None or name is None:
            return None
        sign = -1 if atom["slash"] else 1
        powers[name] = powers.get(name, 0) + sign * int(atom["power"] or 1)
        place = atom.end()
    parts = [name if p == 1 else f"{name}^{p}" for name, p in sorted(powers.items()) if p and name != "units"]
    return " ".join(parts)


def same_unit(a: str, b: str) -> bool:
    """Whether two canonical spellings can be one unit: "pound" is "lb" and "£"."""
    return a == b or b in _AMBIGUOUS.get(a, ()) or a in _AMBIGUOUS.get(b, ())


def several_units(text: str) -> str | None:
    """A quantity in several units, "2 hours and 30 minutes", as "2 h 30 min"; None for anything else."""
    parts: list[str] = []
    place = 0
    while place < len(text):
        number = leading_number(text[place:]) if text[place].isdigit() else None
        unit = _UNIT_PART.match(text, place + number.end) if number else None
        name = unit_of(unit[1]) if unit else None
        if number is None or unit is None or not name or len(parts) > 3:
            return None
        parts.append(f"{number.value} {name}")
        place = unit.end()
    return " ".join(parts) if len(parts) > 1 else None
