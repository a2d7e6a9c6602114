// The normal distribution of numpy.random.RandomState(seed), so that a seed is the image of `finetune generate`.
// Source: Matsumoto and Nishimura, "Mersenne Twister" (1998), MT19937; Marsaglia's polar method.

const N = 624;
const M = 397;

function* words(seed) { // 32-bit integers
  const key = new Uint32Array(N);
  key[0] = seed;
  for (let i = 1; i < N; i++) key[i] = Math.imul(1812433253, key[i - 1] ^ (key[i - 1] >>> 30)) + i;
  for (;;) {
    for (let i = 0; i < N; i++) {
      const y = (key[i] & 0x80000000) | (key[(i + 1) % N] & 0x7fffffff);
      key[i] = key[(i + M) % N] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    for (let y of key) {
      y ^= y >>> 11;
      y ^= (y << 7) & 0x9d2c5680;
      y ^= (y << 15) & 0xefc60000;
      yield (y ^ (y >>> 18)) >>> 0;
    }
  }
}

export function normals(seed, count) { // Float32Array
  const source = words(seed);
  const word = () => source.next().value;
  const uniform = () => 2 * (((word() >>> 5) * 67108864 + (word() >>> 6)) / 9007199254740992) - 1;
  const values = new Float32Array(count);
  for (let i = 0; i < count; i += 2) {
    let x, y, r;
    do {
      x = uniform();
      y = uniform();
      r = x * x + y * y;
    } while (r >= 1 || r === 0);
    const scale = Math.sqrt((-2 * Math.log(r)) / r);
    values[i] = scale * y;
    if (i + 1 < count) values[i + 1] = scale * x;
  }
  return values;
}
