import re


class Words:
    """A tokenizer that needs no model: words, digits one by one, spaces and signs."""

    bos_token_id = 0

    def __init__(self, adds_bos=False):
        self.adds_bos = adds_bos
        self.pieces, self.ids = ["<s>"], {}

    def encode(self, text, add_special_tokens=True):
        ids = [0] if add_special_tokens and self.adds_bos else []
        for piece in re.findall(r" ?[A-Za-z_]+|\d|\s|.", text):
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
            ids.append(self.ids[piece])
        return ids

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)
