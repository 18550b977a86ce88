//! Bytes of a client that the shadow cannot take yet: behind a hole, or beyond its window.

use std::collections::BTreeMap;

/// What one stored piece costs besides its bytes.
const PIECE_OVERHEAD: usize = 64;

/// Pieces by their offset in the client's stream; they may overlap.
#[derive(Debug, Default)]
pub struct Reorder {
    pieces: BTreeMap<u64, Box<[u8]>>,
    bytes: usize,
}

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
        true
    }

    /// Takes the first piece if it starts at or before `offset`.
    pub fn pop_until(&mut self, offset: u64) -> Option<(u64, Box<[u8]>)> {
        let entry = self.pieces.first_entry()?;
        if *entry.key() > offset {
            return None;
        }
        let (start, data) = entry.remove_entry();
        self.bytes -= data.len() + PIECE_OVERHEAD;
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
        let mut ranges = [None; 3];
        let mut filled = 0;
        for (&start, data) in self.pieces.range(offset + 1..) {
            let end = start + data.len() as u64;
            match ranges.get_mut(filled).and_then(Option::as_mut) {
                Some((_, last)) if start <= *last => *last = end.max(*last),
                Some(_) if filled == 2 => break,
                Some(_) => {
                    filled += 1;
                    ranges[filled] = Some((start, end));
                }
                None => ranges[filled] = Some((start, end)),
            }
        }
        ranges
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
