//! Bytes of a client that the shadow cannot take yet: behind a hole, or beyond its window.

use std::collections::BTreeMap;

/// What one stored piece costs besides its bytes.
const PIECE_OVERHEAD: usize = 64;

/// Pieces by their offset in the client's stream; they may overlap.
#[derive(Debug, Default)]
pub struct Reorder {
    pieces: BTreeMap<u64, Box<[u8]>>,
    bytes: usize,
    /// What the pieces cover, merged: start and end. Those that nothing is missing before go when they
    /// are next looked at.
    ranges: BTreeMap<u64, u64>,
    /// Where pieces were added since the ranges were last asked for, latest last.
    grown: Vec<u64>,
}

/// So many places are remembered as grown: at a loss of 20 % a batch of frames makes about 50 holes.
const MAX_GROWN: usize = 64;

impl Reorder {
    /// Memory held, bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Keeps `data` that starts at `offset`, unless a longer piece is there, or the whole would
    /// grow beyond `limit` bytes. Returns whether the bytes are held.
    pub fn insert(&mut self, offset: u64, data: &[u8], limit: usize) -> bool {
        if let Some(there) = self.pieces.get(&offset)
            && there.len() >= data.len()
        {
            return true;
        }
        if self.bytes + data.len() + PIECE_OVERHEAD > limit {
            return false;
        }
        self.bytes += data.len() + PIECE_OVERHEAD;
        if let Some(shorter) = self.pieces.insert(offset, data.into()) {
            self.bytes -= shorter.len() + PIECE_OVERHEAD;
        }
        self.cover(offset, offset + data.len() as u64);
        true
    }

    /// Merges a range with those that it touches.
    fn cover(&mut self, mut start: u64, mut end: u64) {
        if let Some((&left, &right)) = self.ranges.range(..=start).next_back()
            && right >= start
        {
            (start, end) = (left, end.max(right));
        }
        while let Some((&left, &right)) = self.ranges.range(start..=end).next() {
            end = end.max(right);
            self.ranges.remove(&left);
        }
        self.ranges.insert(start, end);
        // Mostly the last one grows again.
        if self
            .grown
            .last()
            .is_none_or(|last| !(start..end).contains(last))
        {
            if self.grown.len() == MAX_GROWN {
                self.grown.remove(0);
            }
            self.grown.push(start);
        }
    }

    fn forget_ranges(&mut self, held: u64) {
        while let Some(first) = self.ranges.first_entry()
            && *first.key() <= held
        {
            first.remove();
        }
    }

    /// The ranges behind `held` that grew since the last call, latest first, each once.
    pub fn take_grown(&mut self, held: u64) -> Vec<(u64, u64)> {
        self.forget_ranges(held);
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for place in std::mem::take(&mut self.grown).into_iter().rev() {
            let covering = self.ranges.range(..=place).next_back();
            if let Some((&start, &end)) = covering
                && place < end
                && !ranges.contains(&(start, end))
            {
                ranges.push((start, end));
            }
        }
        ranges
    }

    /// Takes the first piece if it starts at or before `offset`.
    pub fn pop_until(&mut self, offset: u64) -> Option<(u64, Box<[u8]>)> {
        let entry = self.pieces.first_entry()?;
        if *entry.key() > offset {
            return None;
        }
        let (start, data) = entry.remove_entry();
        self.bytes -= data.len() + PIECE_OVERHEAD;
        let end = start + data.len() as u64;
        while let Some(first) = self.ranges.first_entry()
            && *first.get() <= end
        {
            first.remove();
        }
        Some((start, data))
    }

    /// The offset up to which bytes are held without a hole, where everything before `end` is held
    /// here or elsewhere. Looks only at pieces that start between `from` and the result: no piece
    /// that starts before `from` may reach beyond `end`.
    pub fn contiguous(&self, from: u64, mut end: u64) -> u64 {
        for (&start, data) in self.pieces.range(from..) {
            if start > end {
                break;
            }
            end = end.max(start + data.len() as u64);
        }
        end
    }

    /// Whether something is held that starts behind `offset`.
    pub fn is_held_behind(&self, offset: u64) -> bool {
        self.pieces.range(offset + 1..).next().is_some()
    }

    /// Up to three ranges that start behind `offset`, merged, lowest first (RFC 2018 section 3).
    pub fn ranges_behind(&self, offset: u64) -> [Option<(u64, u64)>; 3] {
        let mut ranges = self.ranges.range(offset + 1..);
        std::array::from_fn(|_| ranges.next().map(|(start, end)| (*start, *end)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_full_store_refuses_and_says_so() {
        let mut store = Reorder::default();
        assert!(store.insert(10, &[0; 100], 200));
        assert!(!store.insert(200, &[0; 100], 200));
        assert_eq!(store.bytes(), 100 + PIECE_OVERHEAD);
        assert!(store.insert(10, &[0; 50], 200), "already held");
    }

    proptest! {
        #[test]
        fn the_stream_comes_out_as_it_was_however_it_was_cut(
            pieces in proptest::collection::vec((0u64..200, 1usize..40), 1..60),
        ) {
            let stream: Vec<u8> = (0..=255).collect();
            let mut store = Reorder::default();
            let mut held = vec![false; 256];
            for &(start, len) in &pieces {
                let end = (start as usize + len).min(256);
                prop_assert!(store.insert(start, &stream[start as usize..end], usize::MAX));
                held[start as usize..end].fill(true);
            }
            let expected = held.iter().position(|h| !h).unwrap_or(256) as u64;
            prop_assert_eq!(store.contiguous(0, 0), expected);
            for (start, end) in store.ranges_behind(expected).into_iter().flatten() {
                prop_assert!(held[start as usize..end as usize].iter().all(|h| *h));
                prop_assert!(held.get(end as usize).is_none_or(|h| !h));
            }
            let mut grown = store.take_grown(expected);
            grown.sort_unstable();
            let covered: Vec<usize> = grown.iter().flat_map(|(l, r)| *l as usize..*r as usize).collect();
            let behind: Vec<usize> = (expected as usize..256).filter(|at| held[*at]).collect();
            prop_assert_eq!(covered, behind, "every range behind the hole, each once");
            prop_assert_eq!(store.take_grown(expected), vec![], "nothing grew since");
            let mut read = Vec::new();
            while let Some((start, data)) = store.pop_until(read.len() as u64) {
                let skip = read.len() - start as usize;
                read.extend_from_slice(data.get(skip..).unwrap_or(&[]));
            }
            prop_assert_eq!(&read[..], &stream[..expected as usize]);
            if expected == 256 { prop_assert_eq!(store.bytes(), 0); }
        }
    }
}
