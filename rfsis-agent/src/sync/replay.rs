//! Which sequence numbers came already: the window of RFC 4303 section 3.4.3, on a ring of bits that
//! is never shifted (RFC 6479).

/// How far behind the highest number one may come and still count.
pub const WINDOW: u64 = 1024;

/// The numbers seen among the last [`WINDOW`].
#[derive(Clone, Debug)]
pub struct ReplayWindow {
    highest: u64,
    /// Bit `n % WINDOW`: `n` was seen, for each `n` in the window.
    seen: [u64; (WINDOW / 64) as usize],
}

impl Default for ReplayWindow {
    fn default() -> Self {
        Self {
            highest: 0,
            seen: [0; (WINDOW / 64) as usize],
        }
    }
}

impl ReplayWindow {
    /// Whether `sequence` is seen for the first time; from now on it is seen.
    ///
    /// What has fallen behind the window counts as seen, and so does 0, which nobody sends.
    pub fn accept(&mut self, sequence: u64) -> bool {
        if sequence > self.highest {
            // Where the window goes stood older numbers. Those between may still come.
            let skipped = (sequence - self.highest).min(WINDOW);
            for number in sequence - skipped + 1..=sequence {
                let (word, bit) = place(number);
                self.seen[word] &= !bit;
            }
            self.highest = sequence;
        } else if sequence == 0 || self.highest - sequence >= WINDOW {
            return false;
        }
        let (word, bit) = place(sequence);
        let first = self.seen[word] & bit == 0;
        self.seen[word] |= bit;
        first
    }
}

fn place(sequence: u64) -> (usize, u64) {
    let index = sequence % WINDOW;
    ((index / 64) as usize, 1 << (index % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_last_1024_numbers_count_once_in_any_order() {
        let mut window = ReplayWindow::default();
        assert!(window.accept(5000));
        assert!(!window.accept(5000 - WINDOW));
        for sequence in (5000 - WINDOW + 1..5000).rev() {
            assert!(window.accept(sequence), "{sequence}");
            assert!(!window.accept(sequence), "{sequence} again");
        }
    }

    #[test]
    fn the_ends_of_the_number_space_are_no_exception() {
        let mut window = ReplayWindow::default();
        for (sequence, first) in [
            (0, false),
            (1, true),
            (1, false),
            (u64::MAX, true),
            (u64::MAX, false),
            (1, false),
            (u64::MAX - WINDOW, false),
            (u64::MAX - WINDOW + 1, true),
        ] {
            assert_eq!(window.accept(sequence), first, "{sequence}");
        }
    }

    proptest! {
        /// Against a set that forgets nothing.
        #[test]
        fn a_number_counts_if_it_is_new_and_not_too_old(
            start in 1u64..1 << 40,
            steps in proptest::collection::vec(
                prop_oneof![4 => -1100i64..1100, 1 => -5000i64..5000], 1..400,
            ),
        ) {
            let mut window = ReplayWindow::default();
            let (mut seen, mut highest) = (BTreeSet::new(), 0);
            for step in [0].into_iter().chain(steps) {
                let sequence = start.max(highest).saturating_add_signed(step);
                let expected = sequence > 0 && sequence + WINDOW > highest && seen.insert(sequence);
                highest = highest.max(sequence);
                prop_assert_eq!(window.accept(sequence), expected, "{}", sequence);
            }
        }
    }
}
