"""Dates and times of day in one spelling: "March 1st, 2024" -> "2024-03-01", "03:30 p.m." -> "3:30 pm"."""

import re

_MONTHS = "january february march april may june july august september october november december".split()
_MONTH = {name: n for n, month in enumerate(_MONTHS, start=1) for name in (month, month[:3])}
_MONTH |= {"sept": 9}
_DAY, _YEAR, _NAME = r"(?P<day>[0-9]{1,2})(?:st|nd|rd|th)?", r"(?P<year>[0-9]{4})", r"(?P<month>[a-z]{3,9})\.?"
_DATES = (
    re.compile(rf"{_NAME} (?:the )?{_DAY}(?:,? {_YEAR})?"),
    re.compile(rf"(?:the )?{_DAY} (?:of )?{_NAME}(?:,? {_YEAR})?"),
    re.compile(r"(?P<year>[0-9]{4})[-/](?P<month>[0-9]{1,2})[-/](?P<day>[0-9]{1,2})"),
    # The day tells itself from the month above 12: 12/25/2019, 25.12.2019.
    re.compile(r"(?P<month>0?[1-9]|1[0-2])[-/.](?P<day>1[3-9]|2[0-9]|3[01])[-/.](?P<year>[0-9]{4})"),
    re.compile(r"(?P<day>1[3-9]|2[0-9]|3[01])[-/.](?P<month>0?[1-9]|1[0-2])[-/.](?P<year>[0-9]{4})"),
)
_CLOCK = re.compile(r"0?([0-9]{1,2}):([0-9]{2}(?::[0-9]{2})?) ?(?:([ap])\.? ?m)?")
_HOUR = re.compile(r"0?([0-9]{1,2})(?: ?o'? ?clock)?(?: ?([ap])\.? ?m)?")


def date_or_time(text: str) -> str | None:
    """The one spelling of a date, a month or a time of day in lower case; None if the text is none of them."""
    if clock := _CLOCK.fullmatch(text):
        return f"{clock[1]}:{clock[2]}" + (f" {clock[3]}m" if clock[3] else "")
    if not text.isdigit() and (hour := _HOUR.fullmatch(text)):
        return f"{hour[1]}:00" + (f" {hour[2]}m" if hour[2] else "")
    if text.rstrip(".") in _MONTH:
        return _MONTHS[_MONTH[text.rstrip(".")] - 1]
    for pattern in _DATES:
        if date := pattern.fullmatch(text):
            month = int(date["month"]) if date["month"].isdigit() else _MONTH.get(date["month"], 0)
            if 1 <= month <= 12 and 1 <= int(date["day"]) <= 31:
                return f"{date['year'] or 'every year'}-{month:02}-{int(date['day']):02}"
    return None
