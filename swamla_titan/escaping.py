"""Escapes control characters in text for terminals and logs.

File names, values of a configuration and messages of libraries may contain line breaks, terminal escape sequences, and
characters that the stream's encoding lacks. Standard library only, because every process begins with it.
"""

# Control characters, line separators, marks of writing direction, and surrogates (bytes of names that are no text).
_OF_DIRECTION = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *_OF_DIRECTION, *range(0xD800, 0xE000))
_ONE_LINE = {code: ascii(chr(code))[1:-1] for code in _CONTROLS}
_SEVERAL_LINES = {code: text for code, text in _ONE_LINE.items() if chr(code) not in "\n\t"}


def one_line(text: object) -> str:
    """`text` with every control character escaped, line breaks included; valid UTF-8."""
    return str(text).translate(_ONE_LINE)


def several_lines(text: object) -> str:
    """`text` with every control character escaped, except line breaks and tabs."""
    return str(text).translate(_SEVERAL_LINES)
