//! Random numbers from a seed: the only random source in the simulator, tests and benchmarks.
//!
//! Invariants
//! 1. The same seed gives the same numbers, on every machine and in every version of the toolchain.
//! 2. A fork is independent of its parent: drawing more from one never changes what the other
//!    gives, so that a change in the disk's use of random numbers does not change the workload.
//!
//! xoshiro256++ seeded by SplitMix64 (Blackman and Vigna, "Scrambled linear pseudorandom number
//! generators", 2021). It is not suitable for secrets.

use crate::base::mix::mix;

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub struct Rng {
    state: [u64; 4],
}

impl Rng {
    /// The stream of this seed.
    pub fn new(seed: u64) -> Self {
        let mut state = [0; 4];
        let mut x = seed;
        for word in &mut state {
            x = mix(x);
            *word = x;
        }
        Rng { state }
    }

    /// Another stream for each list of numbers.
    pub fn of(numbers: &[u64]) -> Self {
        Rng::new(numbers.iter().fold(0, |seed, number| mix(seed ^ number)))
    }

    /// An independent stream; `purpose` keeps forks of one parent apart.
    pub fn fork(&mut self, purpose: u64) -> Self {
        Rng::new(self.draw() ^ mix(purpose))
    }

    /// 64 random bits.
    pub fn draw(&mut self) -> u64 {
        let s = &mut self.state;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "nothing is below zero");
        ((u128::from(self.draw()) * u128::from(bound)) >> 64) as u64
    }

    /// A number from `low` to `high`, both included.
    pub fn within(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// True with a chance of `percent` in a hundred.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of the items.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len() as u64) as usize]
    }

    /// Random bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.draw().to_le_bytes()[..chunk.len()]);
        }
    }

    /// This many random bytes.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.fill(&mut bytes);
        bytes
    }

    /// A random index, with probabilities proportional to the weights, which are not all zero.
    pub fn weighted(&mut self, weights: &[u32]) -> usize {
        let mut left = self.below(weights.iter().map(|&w| u64::from(w)).sum());
        for (index, &weight) in weights.iter().enumerate() {
            if left < u64::from(weight) {
                return index;
            }
            left -= u64::from(weight);
        }
        unreachable!("the number drawn is below the sum of the weights")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A seed printed by a failure must mean the same run a year later.
    #[test]
    fn a_seed_means_the_same_numbers_for_ever() {
        let mut rng = Rng::new(1);
        let drawn: Vec<u64> = (0..3).map(|_| rng.draw()).collect();
        let mut again = Rng::new(1);
        assert_eq!(drawn, (0..3).map(|_| again.draw()).collect::<Vec<_>>());
        let mut fork = again.fork(7);
        assert_ne!(fork.draw(), again.draw());
    }

    /// A generator that never reaches a bound would leave cases out for ever.
    #[test]
    fn bounds_are_reached_and_kept() {
        let mut rng = Rng::new(2);
        let mut seen = [0u32; 5];
        for _ in 0..1000 {
            seen[rng.within(0, 4) as usize] += 1;
            assert_ne!(rng.weighted(&[1, 0, 3]), 1);
        }
        assert!(seen.iter().all(|&n| n > 100), "{seen:?}");
    }
}
