//! The sync channel: what the two nodes tell each other about flows (`docs/protocol.md`).
//!
//! No I/O here: [`channel`] makes and judges datagrams, [`record`] is what stands in them, [`snapshot`] is
//! what a late join sends in parts, and [`replay`] remembers which datagrams came already.

pub mod channel;
pub mod prompt;
pub mod record;
pub mod replay;
pub mod snapshot;

pub use channel::{Channel, MAX_DATAGRAM, Opened, SyncError};
pub use prompt::{Prompts, Term};
pub use record::{Confirm, MAX_PART_LEN, Offer, Open, Part, Record, RecordError, Records, Sack};
pub use snapshot::{MAX_SNAPSHOT, Snapshot};

/// Takes big-endian fields from the front of bytes.
struct Reader<'a>(&'a [u8]);

/// The bytes end before the field does.
struct Cut;

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Cut> {
        let (head, rest) = self.0.split_first_chunk().ok_or(Cut)?;
        self.0 = rest;
        Ok(*head)
    }

    fn slice(&mut self, len: usize) -> Result<&'a [u8], Cut> {
        let (head, rest) = self.0.split_at_checked(len).ok_or(Cut)?;
        self.0 = rest;
        Ok(head)
    }

    fn u16(&mut self) -> Result<u16, Cut> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Cut> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, Cut> {
        self.array().map(u64::from_be_bytes)
    }
}
