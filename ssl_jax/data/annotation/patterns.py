"""Regular expressions of what a rule can find in text; every one takes time linear in the text."""

from __future__ import annotations

import re

from ssl_jax.config.annotation import EntityType

# Addresses are ASCII, so that one ends where Chinese text follows without a space; a closing mark is not part of it.
_URL = r"(?<![A-Za-z0-9])(?:https?://|www\.)[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]*[A-Za-z0-9/_~=&%#+-]"
_EMAIL = r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9-])"
ADDRESS = rf"{_URL}|{_EMAIL}"

_MONTH = (
    r"(?:Jan(?:uary|\.)?|Feb(?:ruary|\.)?|Mar(?:ch|\.)?|Apr(?:il|\.)?|May|June?\.?|July?\.?|Aug(?:ust|\.)?"
    r"|Sept?(?:ember|\.)?|Oct(?:ober|\.)?|Nov(?:ember|\.)?|Dec(?:ember|\.)?)"
)
_WEEKDAY = r"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day"
_DAY = r"(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?"
_YEAR = r"(?:1[5-9]|20)\d\d"
# Marks off a number on both sides: no digit of another number, no Latin letter; a Han character may be next to it.
_BEFORE = r"(?<![A-Za-z0-9_.,:/-])"
_AFTER = r"(?![A-Za-z0-9_/-]|[.,:]\d)"

_NUMERIC_DATE = (
    rf"{_YEAR}[-/.](?:0?[1-9]|1[0-2])[-/.](?:0?[1-9]|[12]\d|3[01])"
    r"|(?:0?[1-9]|[12]\d|3[01])[-/.](?:0?[1-9]|[12]\d|3[01])[-/.](?:\d\d){1,2}"
)
_NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
_CURRENCY_SIGN = r"[$€£¥¥₹₩₽]"
_CLOCK = r"(?:[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d)?"

_ENGLISH_DATE = (
    rf"{_BEFORE}(?:{_NUMERIC_DATE}|(?:{_WEEKDAY},? )?(?:the )?{_DAY}(?: of)? {_MONTH}(?:,? {_YEAR})?"
    rf"|(?:{_WEEKDAY},? )?{_MONTH} (?:{_DAY}(?:,? {_YEAR})?|{_YEAR})){_AFTER}"
    rf"|\b(?:(?:next|last|this) (?:week|weekend|month|year|{_WEEKDAY}|spring|summer|autumn|fall|winter)"
    rf"|{_WEEKDAY}s?|today|tonight|tomorrow|yesterday)\b"
    rf"|(?:(?<=\bin )|(?<=\bsince )|(?<=\buntil )|(?<=\bbefore )|(?<=\bafter )){_YEAR}{_AFTER}"
)
_ENGLISH_TIME = (
    rf"{_BEFORE}(?:{_CLOCK}(?: ?[ap]\.?m\b\.?)?|(?:1[0-2]|0?[1-9]) ?[ap]\.?m\b\.?|(?:1[0-2]|[1-9]) ?o['’]clock)"
    rf"(?!\w|:\d)|\b(?:noon|midnight|(?:quarter|half) (?:past|to) \w+)\b"
)
_ENGLISH_UNIT = (
    r"(?:dollars?|cents?|bucks?|euros?|pounds?|yen|yuan|USD|EUR|GBP|percent|per cent"
    r"|k[gm]|cm|mm|m[lg]|lbs?|oz|grams?|kilos?|miles?|met(?:er|re)s?|kilomet(?:er|re)s?|feet|inch(?:es)?|lit(?:er|re)s?"
    r"|hours?|minutes?|seconds?|days?|weeks?|months?|years?)\b"
)
_ENGLISH_AMOUNT = (
    rf"{_CURRENCY_SIGN} ?{_NUMBER}(?: ?(?:million|billion|thousand)\b|[kKmM]\b)?"
    rf"|(?<![\w.,]){_NUMBER}(?: ?[%‰€£]|(?: |-)?(?:million |billion |thousand )?{_ENGLISH_UNIT})"
)

_CHINESE_DIGIT = r"[〇零一二两三四五六七八九十\d]"
_CHINESE_NUMBER = rf"(?:{_NUMBER}|[零一二两三四五六七八九十百千万亿半]{{1,16}})[百千万亿]{{0,2}}"
_MONTH_AND_DAY = rf"{_CHINESE_DIGIT}{{1,3}}月(?:{_CHINESE_DIGIT}{{1,3}}[日号])?"
_CHINESE_DATE = (
    rf"{_BEFORE}(?:{_NUMERIC_DATE}){_AFTER}"
    # A year is written digit by digit; 二十年 is a duration.
    rf"|(?<!{_CHINESE_DIGIT})[〇零一二三四五六七八九\d]{{4}}年(?:{_MONTH_AND_DAY})?"
    rf"|(?<!{_CHINESE_DIGIT}){_CHINESE_DIGIT}{{1,3}}月{_CHINESE_DIGIT}{{1,3}}[日号]"
    r"|(?:[上下这本]个?)?(?:星期|礼拜|周)[一二三四五六日天末]|[上下这本]个?(?:星期|礼拜|周|月)(?![一二三四五六日天末])"
    r"|大?[昨前明后]天|今[天日年]|明年|去年|[昨今明]晚"
)
_DAY_PART = r"(?:凌晨|清晨|早上|早晨|上午|中午|下午|傍晚|晚上|夜里|半夜)"
_MINUTES = rf"(?:钟|半|整|[一三]刻|{_CHINESE_DIGIT}{{1,3}}分)"
_CHINESE_TIME = (
    rf"{_DAY_PART} ?(?:{_CLOCK}|{_CHINESE_DIGIT}{{1,3}}[点时]{_MINUTES}?)"
    rf"|(?<![\d:.]){_CLOCK}(?![\d:])|(?<![\d.])\d{{1,2}}点{_MINUTES}?(?![\d个儿])"
    # 一点 alone is more often "a little".
    rf"|(?<!{_CHINESE_DIGIT}){_CHINESE_DIGIT}{{1,3}}点{_MINUTES}|凌晨|中午|半夜"
)
_CHINESE_UNIT = (
    r"(?:块钱?|元钱?|毛钱?|角钱?|美元|美金|欧元|英镑|日元|港币|人民币|千克|公斤|斤|克|吨|公里|千米|厘米|毫米|米|升|毫升"
    r"|个?小时|分钟|秒钟?|天|个?星期|周|个月|年|岁|度|平方米)"
)
_CHINESE_AMOUNT = (
    rf"{_CURRENCY_SIGN} ?{_NUMBER}[万亿]?|(?<![\d.,]){_NUMBER} ?[%%‰]|百分之{_CHINESE_NUMBER}"
    rf"|(?<![\d.,零一二两三四五六七八九十百千万亿第]){_CHINESE_NUMBER}[多几]? ?{_CHINESE_UNIT}"
)


def _rules(date: str, time: str, amount: str) -> re.Pattern[str]:
    parts: dict[EntityType, str] = {"url": _URL, "email": _EMAIL, "date": date, "time": time, "amount": amount}
    return re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in parts.items()), re.IGNORECASE)


ENGLISH = _rules(_ENGLISH_DATE, _ENGLISH_TIME, _ENGLISH_AMOUNT)
CHINESE = _rules(_CHINESE_DATE, _CHINESE_TIME, _CHINESE_AMOUNT)
ANY = re.compile(f"(?P<url>{_URL})|(?P<email>{_EMAIL})", re.IGNORECASE)
"""Patterns whose group names are entity types; where two fit at one place, the one that is named first wins."""
