"""Capitals as a Trimtab task: what a small model knows, to see whether a correction made for something else costs it.

    python benchmarks/capitals.py --out capitals.jsonl
    trimtab eval --correction DIR --task capitals.jsonl --verifier regex --problems 72

Two questions a country: its capital, and whose capital that is. Countries whose name is in another's (Guinea) or whose
capital has two names (Kyiv) are left out; an answer may leave accents out. It prints what was written, as JSON with a
digest.
"""

import argparse
import hashlib
import json
import re
import unicodedata
from pathlib import Path

CAPITALS = """
Afghanistan Kabul; Albania Tirana; Algeria Algiers; Angola Luanda; Argentina Buenos Aires; Armenia Yerevan;
Australia Canberra; Austria Vienna; Azerbaijan Baku; Bahrain Manama; Bangladesh Dhaka; Belarus Minsk; Belgium Brussels;
Botswana Gaborone; Brazil Brasília; Bulgaria Sofia; Cambodia Phnom Penh; Cameroon Yaoundé; Canada Ottawa;
Chad N'Djamena; Chile Santiago; China Beijing; Colombia Bogotá; Croatia Zagreb; Cuba Havana; Cyprus Nicosia;
Denmark Copenhagen; Ecuador Quito; Egypt Cairo; Eritrea Asmara; Estonia Tallinn; Ethiopia Addis Ababa; Fiji Suva;
Finland Helsinki; France Paris; Gabon Libreville; Georgia Tbilisi; Germany Berlin; Ghana Accra; Greece Athens;
Guyana Georgetown; Haiti Port-au-Prince; Honduras Tegucigalpa; Hungary Budapest; Iceland Reykjavik;
India New Delhi; Indonesia Jakarta; Iran Tehran; Iraq Baghdad; Italy Rome; Jamaica Kingston;
Japan Tokyo; Jordan Amman; Kenya Nairobi; Laos Vientiane; Latvia Riga; Lebanon Beirut; Liberia Monrovia; Libya Tripoli;
Lithuania Vilnius; Madagascar Antananarivo; Malawi Lilongwe; Malaysia Kuala Lumpur; Maldives Malé; Mali Bamako;
Malta Valletta; Mauritania Nouakchott; Moldova Chișinău; Mongolia Ulaanbaatar; Montenegro Podgorica; Morocco Rabat;
Mozambique Maputo; Namibia Windhoek; Nepal Kathmandu; Nicaragua Managua; Niger Niamey; Nigeria Abuja;
Norway Oslo; Oman Muscat; Pakistan Islamabad; Paraguay Asunción; Peru Lima; Philippines Manila; Poland Warsaw;
Portugal Lisbon; Qatar Doha; Romania Bucharest; Russia Moscow; Rwanda Kigali; Senegal Dakar; Serbia Belgrade;
Slovakia Bratislava; Slovenia Ljubljana; Somalia Mogadishu; Spain Madrid; Suriname Paramaribo;
Sweden Stockholm; Switzerland Bern; Syria Damascus; Tajikistan Dushanbe; Thailand Bangkok; Togo Lomé; Tunisia Tunis;
Turkey Ankara; Turkmenistan Ashgabat; Uganda Kampala; Uruguay Montevideo; Uzbekistan Tashkent;
Venezuela Caracas; Vietnam Hanoi; Yemen Sanaa; Zambia Lusaka; Zimbabwe Harare
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the task file to write")
    args = parser.parse_args()
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in problems())
    args.out.write_text(text, encoding="utf-8")
    facts = {
        "benchmark": "capitals",
        "problems": text.count("\n"),
        "task_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    print(json.dumps(facts))


def problems() -> list[dict[str, object]]:
    """Lines of a task file for the verifier `regex`."""
    found: list[dict[str, object]] = []
    for pair in CAPITALS.strip().split(";"):
        country, capital = pair.split(maxsplit=1)
        found.append(problem(country, "capital", f"What is the capital of {country}?", capital))
        found.append(problem(country, "country", f"{capital} is the capital of which country?", country))
    return found


def problem(country: str, kind: str, question: str, answer: str) -> dict[str, object]:
    """A chat of one message, and the pattern that its answer must hold."""
    messages = [{"role": "user", "content": f"{question} Give the name only."}]
    letters = (letter if letter.isascii() else f"[{letter}{_plain(letter)}]" for letter in re.escape(answer))
    pattern = rf"(?i)\b{''.join(letters)}\b"
    return {"id": f"{country} {kind}", "messages": messages, "answer": pattern, "kind": kind}


def _plain(letter: str) -> str:
    """Without its accent."""
    return unicodedata.normalize("NFD", letter)[0]


if __name__ == "__main__":
    main()
