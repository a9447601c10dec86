// SHA-256 of what arrives by pieces, FIPS 180-4. The browser's own digest takes a whole only – 200 MB at once – and is
// missing where the console is reached by plain http from another machine.

// The first 32 bits of the fractional parts of the roots of the first primes. FIPS 180-4 §4.2.2, §5.3.3
const primes = [];
for (let at = 2; primes.length < 64; at++) if (primes.every((prime) => at % prime)) primes.push(at);
const fraction = (root) => Math.floor((root - Math.floor(root)) * 2 ** 32);
const K = Int32Array.from(primes, (prime) => fraction(Math.cbrt(prime)));
const START = primes.slice(0, 8).map((prime) => fraction(Math.sqrt(prime)));

const turn = (word, by) => (word >>> by) | (word << (32 - by));

/** new Sha256().update(bytes).update(more).hex(), with Uint8Arrays of any length. */
export class Sha256 {
  constructor() {
    this.state = Uint32Array.from(START);
    this.words = new Int32Array(64);
    this.rest = new Uint8Array(64); // a block that is not full yet
    this.length = 0;
  }

  update(bytes) {
    let at = 0;
    const filled = this.length % 64;
    this.length += bytes.length;
    if (filled) {
      at = Math.min(64 - filled, bytes.length);
      this.rest.set(bytes.subarray(0, at), filled);
      if (filled + at < 64) return this;
      this.block(this.rest, 0);
    }
    for (; at + 64 <= bytes.length; at += 64) this.block(bytes, at);
    this.rest.set(bytes.subarray(at));
    return this;
  }

  block(bytes, from) {
    const { words, state } = this;
    for (let at = 0; at < 16; at++, from += 4) {
      words[at] = (bytes[from] << 24) | (bytes[from + 1] << 16) | (bytes[from + 2] << 8) | bytes[from + 3];
    }
    for (let at = 16; at < 64; at++) {
      const one = words[at - 15] | 0;
      const other = words[at - 2] | 0;
      words[at] = words[at - 16] + (turn(one, 7) ^ turn(one, 18) ^ (one >>> 3))
        + words[at - 7] + (turn(other, 17) ^ turn(other, 19) ^ (other >>> 10));
    }
    let a = state[0] | 0, b = state[1] | 0, c = state[2] | 0, d = state[3] | 0;
    let e = state[4] | 0, f = state[5] | 0, g = state[6] | 0, h = state[7] | 0;
    for (let at = 0; at < 64; at++) {
      const first = (h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + K[at] + words[at]) | 0;
      const second = ((turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      h = g;
      g = f;
      f = e;
      e = (d + first) | 0;
      d = c;
      c = b;
      b = a;
      a = (first + second) | 0;
    }
    state[0] += a;
    state[1] += b;
    state[2] += c;
    state[3] += d;
    state[4] += e;
    state[5] += f;
    state[6] += g;
    state[7] += h;
  }

  hex() {
    const bits = this.length * 8;
    const padding = new Uint8Array(((119 - (this.length % 64)) % 64) + 9);
    padding[0] = 0x80;
    new DataView(padding.buffer).setUint32(padding.length - 8, Math.floor(bits / 2 ** 32));
    new DataView(padding.buffer).setUint32(padding.length - 4, bits >>> 0);
    this.update(padding);
    return [...this.state].map((word) => word.toString(16).padStart(8, "0")).join("");
  }
}
