"""The gate's text: short chats of several kinds, written for this project.

No model knows them by heart, as it knows famous texts: there a distance from the source would be
that of a recitation. Each chat asks for something and answers it.
"""

CHATS = (
    (
        "Tell me what happened at the lock yesterday.",
        (
            "The barge came up from the old paper mill a little after nine, heavier than "
            "it should have been and with nobody at the tiller. Marta saw it first. She "
            "put down her coffee, ran along the wall and threw a rope over the bow, which "
            "slowed it just enough. When the gate finally closed behind it, water was "
            "already running over the towpath. We spent the afternoon pumping, drying the "
            "engine room and arguing about who had left the upper valve open. In the "
            "evening the owner arrived on a bicycle, thanked everybody twice and offered "
            "to pay for the lamp that had been smashed, but not for the three hours of "
            "work."
        ),
    ),
    (
        "Write a Python function that merges overlapping intervals.",
        (
            "def merge_intervals(intervals):\n"
            '    """Return sorted intervals in which none overlaps another."""\n'
            "    merged = []\n"
            "    for start, end in sorted(intervals):\n"
            "        if merged and start <= merged[-1][1]:\n"
            "            merged[-1] = (merged[-1][0], max(merged[-1][1], end))\n"
            "        else:\n"
            "            merged.append((start, end))\n"
            "    return merged\n"
            "\n"
            "\n"
            "assert merge_intervals([(5, 8), (1, 3), (2, 4)]) == [(1, 4), (5, 8)]\n"
            "assert merge_intervals([]) == []\n"
        ),
    ),
    (
        "How do I repot a large fern without breaking it?",
        (
            "1. Water the plant the evening before, so that the roots hold together.\n"
            "2. Choose a pot that is about four centimetres wider, and cover its hole with "
            "a stone.\n"
            "3. Tie the fronds together loosely with a strip of cloth.\n"
            "4. Lay the old pot on its side and pull gently at the base, never at the "
            "leaves.\n"
            "5. Cut away roots that are brown and soft.\n"
            "6. Fill the gaps with loose soil, press it down with two fingers, and water "
            "again.\n"
            "Keep it out of direct sun for a week; some yellow leaves are normal."
        ),
    ),
    (
        "Fasse die Besprechung kurz zusammen.",
        (
            "Die Werkstatt bekommt im März zwei neue Drehbänke, die alte bleibt bis Juni "
            "stehen. Frau Keller kümmert sich um den Stromanschluss und fragt bei der "
            "Versicherung nach. Der Lieferant hat die Rechnung noch nicht geschickt, "
            "deshalb wird die Zahlung auf den nächsten Monat verschoben. Offen blieb, wer "
            "die Lehrlinge an den Maschinen anlernt."
        ),
    ),
    (
        "Give me last week's readings as JSON.",
        (
            '{"station": "north pier", "unit": "hPa", "readings": [\n'
            '  {"day": "Mon", "low": 1008.4, "high": 1013.9, "gusts": false},\n'
            '  {"day": "Tue", "low": 1001.2, "high": 1009.0, "gusts": true},\n'
            '  {"day": "Wed", "low": 996.7, "high": 1002.5, "gusts": true},\n'
            '  {"day": "Thu", "low": 999.1, "high": 1006.3, "gusts": false},\n'
            '  {"day": "Fri", "low": 1005.8, "high": 1011.6, "gusts": false}\n'
            '], "missing": ["Sat", "Sun"]}'
        ),
    ),
    (
        "Why does my bread stay flat?",
        (
            "Most likely the dough had too little time, or the yeast was old. Try this: "
            "stir a spoon of the yeast into warm water with some sugar; if there is no "
            "foam after ten minutes, buy fresh yeast. Otherwise let the dough rest until "
            "it has doubled, however long that takes in your kitchen, because a cold room "
            "can turn one hour into three. Also check the flour. Whole grain alone rises "
            "less than white flour, so mix the two half and half at first. Finally, heat "
            "the oven well before the loaf goes in."
        ),
    ),
)
