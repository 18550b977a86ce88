//! A connection of the active's kernel at one instant, as a standby needs it to go on from there.
//!
//! ```text
//!  the client's stream:   … taken by the handler │ input          │ fin
//!                                              next             ack
//!  the active's stream:   … acknowledged │ output: written by the handler │ what `handler` writes next
//!                                  unacknowledged
//! ```
//!
//! The layout is in `docs/protocol.md`. It crosses the LAN in parts, each authenticated; all the same
//! what was put together of them is checked as if a stranger had sent it.

use super::Reader;
use super::record::{OPTIONS_LEN, RecordError, options_from_bytes, options_to_bytes};
use crate::segment::Options;

/// Bytes of a snapshot at the most: the kernel's two buffers of a connection and the handler's own two,
/// twice over.
pub const MAX_SNAPSHOT: usize = 2 << 20;

/// A window is smaller than this, bytes (RFC 7323 section 2.3).
const MAX_WINDOW: u32 = 1 << 30;

const FIN: u8 = 1;

/// See the [module](self). All sequence numbers are those on the client's wire.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The first byte of the client that the handler has not taken.
    pub next: u32,
    /// Behind the last that the kernel has received, a FIN included.
    pub ack: u32,
    /// The right edge of the window that the kernel has offered.
    pub edge: u32,
    /// The first byte of `output`: everything before it the client has acknowledged.
    pub unacknowledged: u32,
    /// Behind the last sequence number that the kernel has sent.
    pub sent: u32,
    /// The client takes so many bytes from `unacknowledged` on.
    pub window: u32,
    /// What the client has said in its SYN; of the timestamp, the latest value.
    pub client: Options,
    /// What the active has said in its SYN-ACK; of the timestamp, its clock now.
    pub active: Options,
    /// The client has closed its side, behind `input`.
    pub fin: bool,
    /// The handler, see [`HandlerKind::restore`](crate::handler::HandlerKind::restore).
    pub handler: Vec<u8>,
    /// Bytes of the client from `next` on.
    pub input: Vec<u8>,
    /// Bytes that the handler has written, from `unacknowledged` on.
    pub output: Vec<u8>,
}

impl Snapshot {
    /// What stands for the client's initial sequence number in a handshake that ends at this instant.
    pub fn client_isn(&self) -> u32 {
        self.next.wrapping_sub(1)
    }

    /// What stands for the active's.
    pub fn active_isn(&self) -> u32 {
        self.unacknowledged.wrapping_sub(1)
    }

    /// As it is sent.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for number in [
            self.next,
            self.ack,
            self.edge,
            self.unacknowledged,
            self.sent,
            self.window,
        ] {
            out.extend(number.to_be_bytes());
        }
        out.extend(options_to_bytes(&self.client));
        out.extend(options_to_bytes(&self.active));
        out.push(if self.fin { FIN } else { 0 });
        for bytes in [&self.handler, &self.input] {
            out.extend((bytes.len() as u32).to_be_bytes());
            out.extend(bytes);
        }
        out.extend(&self.output);
        out
    }

    /// Reads what [`Snapshot::to_bytes`] has written.
    ///
    /// # Errors
    /// The first field that no agent writes, also where two fields contradict each other.
    pub fn parse(bytes: &[u8]) -> Result<Self, RecordError> {
        let impossible = |field| RecordError { field };
        if bytes.len() > MAX_SNAPSHOT {
            return Err(impossible("length of a snapshot"));
        }
        let mut reader = Reader(bytes);
        let mut numbers = [0; 6];
        for number in &mut numbers {
            *number = reader.u32()?;
        }
        let [next, ack, edge, unacknowledged, sent, window] = numbers;
        let client = options_from_bytes(reader.array::<OPTIONS_LEN>()?)?;
        let active = options_from_bytes(reader.array::<OPTIONS_LEN>()?)?;
        let [flags] = reader.array()?;
        let handler = take_bytes(&mut reader)?;
        let input = take_bytes(&mut reader)?;
        let snapshot = Self {
            next,
            ack,
            edge,
            unacknowledged,
            sent,
            window,
            client,
            active,
            fin: flags == FIN,
            handler,
            input,
            output: reader.0.to_vec(),
        };
        let received = snapshot.input.len() as u32 + u32::from(snapshot.fin);
        let in_flight = sent.wrapping_sub(unacknowledged);
        let wrong = [
            (flags & !FIN != 0, "flags of a snapshot"),
            (ack.wrapping_sub(next) != received, "acknowledgement"),
            (edge.wrapping_sub(ack) >= MAX_WINDOW, "right edge"),
            (window >= MAX_WINDOW, "window"),
            (in_flight > MAX_SNAPSHOT as u32, "number of bytes in flight"),
        ];
        match wrong.iter().find(|(wrong, _)| *wrong) {
            Some((_, field)) => Err(impossible(field)),
            None => Ok(snapshot),
        }
    }
}

fn take_bytes(reader: &mut Reader<'_>) -> Result<Vec<u8>, RecordError> {
    let len = reader.u32()? as usize;
    Ok(reader.slice(len)?.to_vec())
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// Echo's, in the midst of it.
    pub(crate) fn example() -> Snapshot {
        Snapshot {
            next: 0xffff_fffe,
            ack: 3,
            edge: 0x1003,
            unacknowledged: 0x0102_0304,
            sent: 0x0102_0306,
            window: 0x0002_0000,
            client: Options {
                mss: Some(1460),
                window_scale: Some(7),
                sack_permitted: true,
                timestamp: Some((1, 0)),
            },
            active: Options::default(),
            fin: true,
            handler: vec![0],
            input: b"pend".to_vec(),
            output: b"abc".to_vec(),
        }
    }

    fn snapshots() -> impl Strategy<Value = Snapshot> {
        let bytes = || vec(any::<u8>(), 0..50);
        (any::<(u32, u32, u8, bool)>(), bytes(), bytes(), bytes()).prop_map(
            |((next, unacknowledged, more, fin), handler, input, output)| {
                let ack = next.wrapping_add(input.len() as u32 + u32::from(fin));
                Snapshot {
                    next,
                    ack,
                    edge: ack.wrapping_add(u32::from(more)),
                    unacknowledged,
                    sent: unacknowledged.wrapping_add(u32::from(more)),
                    fin,
                    handler,
                    input,
                    output,
                    ..example()
                }
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(snapshot in snapshots()) {
            prop_assert_eq!(Snapshot::parse(&snapshot.to_bytes()), Ok(snapshot));
        }

        #[test]
        fn what_is_read_was_written(
            snapshot in snapshots(),
            nonsense in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        ) {
            let mut bytes = snapshot.to_bytes();
            for (index, byte) in nonsense {
                let at = index.index(bytes.len());
                bytes[at] = byte;
            }
            if let Ok(read) = Snapshot::parse(&bytes) {
                prop_assert_eq!(read.to_bytes(), bytes);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..200)) {
            let _ = Snapshot::parse(&bytes);
        }
    }

    /// The page that documents the format draws it so.
    #[test]
    fn the_layout_is_the_documented_one() {
        let expected: &[&[u8]] = &[
            &[0xff, 0xff, 0xff, 0xfe, 0, 0, 0, 3, 0, 0, 0x10, 3],
            &[1, 2, 3, 4, 1, 2, 3, 6, 0, 2, 0, 0],
            &[15, 7, 5, 0xb4, 0, 0, 0, 1, 0, 0, 0, 0],
            &[0; 12],
            &[1, 0, 0, 0, 1, 0, 0, 0, 0, 4],
            b"pendabc",
        ];
        assert_eq!(example().to_bytes(), expected.concat());
    }

    #[test]
    fn numbers_that_contradict_each_other_are_refused() {
        type Change = fn(&mut Snapshot);
        let wrong: [(Change, &str); 5] = [
            (|snapshot| snapshot.fin = false, "acknowledgement"),
            (|snapshot| snapshot.ack += 1, "acknowledgement"),
            (|snapshot| snapshot.edge = 2, "right edge"),
            (|snapshot| snapshot.window = 1 << 30, "window"),
            (|snapshot| snapshot.sent -= 3, "number of bytes in flight"),
        ];
        for (change, field) in wrong {
            let mut snapshot = example();
            change(&mut snapshot);
            let refused = Snapshot::parse(&snapshot.to_bytes());
            assert_eq!(refused, Err(RecordError { field }));
        }
        let mut long = example().to_bytes();
        long.resize(MAX_SNAPSHOT + 1, 0);
        assert!(Snapshot::parse(&long).is_err());
    }
}
