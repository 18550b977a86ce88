//! Records: what the nodes tell each other about one flow.
//!
//! Each is type, length and value, so that a reader steps over types that it does not know. A type
//! that it knows has exactly one form: what is parsed is emitted as the same bytes.

#[cfg(test)]
pub(super) mod tests;

use rfsis_common::maps::FlowKey;

use super::{Cut, MAX_SNAPSHOT, Reader};
use crate::segment::Options;

/// Bytes of type and length in front of each value.
const HEADER_LEN: usize = 2;
/// Bytes of flow and client's number, with which each value begins.
const FLOW_LEN: usize = 12;
/// Bytes of the options of one side.
pub(super) const OPTIONS_LEN: usize = 12;
/// Bytes of a SACK block.
const BLOCK_LEN: usize = 8;
/// Bytes of the longest record.
pub const MAX_RECORD_LEN: usize = HEADER_LEN + u8::MAX as usize;
/// Most bytes of a snapshot in one record.
pub const MAX_PART_LEN: usize = u8::MAX as usize - FLOW_LEN - 8;

/// Types of records.
mod kind {
    pub const OPEN: u8 = 1;
    pub const CONFIRM: u8 = 2;
    pub const REFUSE: u8 = 3;
    pub const CLOSE: u8 = 4;
    pub const TOLD: u8 = 5;
    pub const OFFER: u8 = 6;
    pub const PART: u8 = 7;
    pub const GOT: u8 = 8;
    pub const DECLINE: u8 = 9;
    pub const KNOWN: u8 = 10;
    pub const LOST: u8 = 11;
}

/// What one node tells the other about a flow. `client_isn` tells the connection from others of the
/// same ports, before and after it; `join` one late join from those before and after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// Active to standby: a connection that the active is about to accept.
    Open(Open),
    /// Standby to active: it follows this handshake. The answer to [`Record::Open`], and to the copy of a
    /// SYN-ACK that is held.
    Known(Open),
    /// Standby to active: what it holds of a flow.
    Confirm(Confirm),
    /// Standby to active: it does not follow this flow, or no longer. Final for the connection.
    Refuse {
        /// The flow.
        flow: FlowKey,
        /// Initial sequence number of the client.
        client_isn: u32,
    },
    /// Active to standby: the flow is no more.
    Close {
        /// The flow.
        flow: FlowKey,
        /// Initial sequence number of the client.
        client_isn: u32,
    },
    /// Active to standby: the client was told that more arrived than the standby confirmed.
    Told {
        /// The flow.
        flow: FlowKey,
        /// Initial sequence number of the client.
        client_isn: u32,
        /// The acknowledgement that the client saw.
        ack: u32,
    },
    /// Active to standby: a flow that the standby does not know; a snapshot of it is to be had.
    Offer(Offer),
    /// Active to standby: bytes of a snapshot.
    Part(Part),
    /// Standby to active: it keeps the flow's frames, and holds the first `next` bytes of the snapshot.
    Got {
        /// The flow.
        flow: FlowKey,
        /// Number of the late join.
        join: u32,
        /// Bytes. All: the flow is restored.
        next: u32,
    },
    /// Standby to active: it has no use for the snapshot.
    Decline {
        /// The flow.
        flow: FlowKey,
        /// Number of the late join.
        join: u32,
    },
    /// Standby to active: it lacks frames from before the snapshot; another late join may do better.
    Lost {
        /// The flow.
        flow: FlowKey,
        /// Number of the late join.
        join: u32,
    },
}

/// A flow that the standby does not know, or of which it lacks something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The flow.
    pub flow: FlowKey,
    /// Number of the late join.
    pub join: u32,
    /// By which the active has told the connection from others until now.
    pub client_isn: u32,
    /// Behind the last sequence number that the active sent.
    pub next: u32,
}

/// A piece of a flow's snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The flow.
    pub flow: FlowKey,
    /// Number of the late join.
    pub join: u32,
    /// Bytes of the whole snapshot, at most [`MAX_SNAPSHOT`].
    pub total: u32,
    /// Where these begin.
    pub offset: u32,
    /// One to [`MAX_PART_LEN`] bytes, that lie within the whole.
    pub bytes: Box<[u8]>,
}

/// A handshake, as the active holds its SYN-ACK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    /// The flow.
    pub flow: FlowKey,
    /// Initial sequence number of the client.
    pub client_isn: u32,
    /// Initial sequence number of the active.
    pub active_isn: u32,
    /// Window of the client's SYN, bytes: never scaled (RFC 7323 section 2.2).
    pub client_window: u16,
    /// Options of the SYN.
    pub client: Options,
    /// Options of the SYN-ACK.
    pub active: Options,
}

/// What the standby holds of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confirm {
    /// The flow.
    pub flow: FlowKey,
    /// Initial sequence number of the client.
    pub client_isn: u32,
    /// Everything before this sequence number is held; a FIN counts one.
    pub ack: u32,
    /// Bytes from this sequence number on cannot be taken.
    pub edge: u32,
    /// What is held behind holes.
    pub sack: Sack,
}

/// Up to four SACK blocks (RFC 2018 section 3): first sequence number, and the one behind the last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sack {
    /// `(0, 0)` behind `len`, so that equal lists are equal.
    blocks: [(u32, u32); Sack::MAX],
    len: u8,
}

impl Sack {
    /// Most blocks of a list: more find no room in a TCP header.
    pub const MAX: usize = 4;

    /// The blocks, in the order given.
    pub fn blocks(&self) -> &[(u32, u32)] {
        &self.blocks[..usize::from(self.len)]
    }
}

impl FromIterator<(u32, u32)> for Sack {
    /// The first [`Sack::MAX`] blocks; the rest is left out.
    fn from_iter<I: IntoIterator<Item = (u32, u32)>>(blocks: I) -> Self {
        let mut sack = Self::default();
        for (place, block) in sack.blocks.iter_mut().zip(blocks) {
            *place = block;
            sack.len += 1;
        }
        sack
    }
}

/// A record that no agent writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("sync record with an impossible {field}: not sent by an rfsis-agent?")]
pub struct RecordError {
    /// The first field that is wrong.
    pub field: &'static str,
}

impl From<Cut> for RecordError {
    fn from(_: Cut) -> Self {
        Self {
            field: "record length",
        }
    }
}

impl Record {
    /// Bytes that [`emit`](Self::emit) appends, at most [`MAX_RECORD_LEN`].
    pub fn wire_len(&self) -> usize {
        let rest = match self {
            Record::Open(_) | Record::Known(_) => 4 + 2 + 2 * OPTIONS_LEN,
            Record::Confirm(confirm) => 8 + confirm.sack.blocks().len() * BLOCK_LEN,
            Record::Refuse { .. }
            | Record::Close { .. }
            | Record::Decline { .. }
            | Record::Lost { .. } => 0,
            Record::Told { .. } | Record::Got { .. } => 4,
            Record::Offer(_) => 8,
            Record::Part(part) => 8 + part.bytes.len(),
        };
        HEADER_LEN + FLOW_LEN + rest
    }

    /// Appends the record to a datagram.
    pub fn emit(&self, out: &mut Vec<u8>) {
        let (kind, flow, number) = match *self {
            Record::Open(Open {
                flow, client_isn, ..
            }) => (kind::OPEN, flow, client_isn),
            Record::Known(Open {
                flow, client_isn, ..
            }) => (kind::KNOWN, flow, client_isn),
            Record::Confirm(Confirm {
                flow, client_isn, ..
            }) => (kind::CONFIRM, flow, client_isn),
            Record::Refuse { flow, client_isn } => (kind::REFUSE, flow, client_isn),
            Record::Close { flow, client_isn } => (kind::CLOSE, flow, client_isn),
            Record::Told {
                flow, client_isn, ..
            } => (kind::TOLD, flow, client_isn),
            Record::Offer(Offer { flow, join, .. }) => (kind::OFFER, flow, join),
            Record::Part(Part { flow, join, .. }) => (kind::PART, flow, join),
            Record::Got { flow, join, .. } => (kind::GOT, flow, join),
            Record::Decline { flow, join } => (kind::DECLINE, flow, join),
            Record::Lost { flow, join } => (kind::LOST, flow, join),
        };
        out.extend([kind, (self.wire_len() - HEADER_LEN) as u8]);
        out.extend(flow.client_addr.to_be_bytes());
        out.extend(flow.client_port.to_be_bytes());
        out.extend(flow.service_port.to_be_bytes());
        out.extend(number.to_be_bytes());
        match self {
            Record::Open(open) | Record::Known(open) => {
                out.extend(open.active_isn.to_be_bytes());
                out.extend(open.client_window.to_be_bytes());
                out.extend(options_to_bytes(&open.client));
                out.extend(options_to_bytes(&open.active));
            }
            Record::Confirm(confirm) => {
                out.extend(confirm.ack.to_be_bytes());
                out.extend(confirm.edge.to_be_bytes());
                for (left, right) in confirm.sack.blocks() {
                    out.extend(left.to_be_bytes());
                    out.extend(right.to_be_bytes());
                }
            }
            Record::Refuse { .. }
            | Record::Close { .. }
            | Record::Decline { .. }
            | Record::Lost { .. } => {}
            Record::Told { ack, .. } => out.extend(ack.to_be_bytes()),
            Record::Offer(offer) => {
                out.extend(offer.client_isn.to_be_bytes());
                out.extend(offer.next.to_be_bytes());
            }
            Record::Got { next, .. } => out.extend(next.to_be_bytes()),
            Record::Part(part) => {
                out.extend(part.total.to_be_bytes());
                out.extend(part.offset.to_be_bytes());
                out.extend(&part.bytes);
            }
        }
    }

    /// Takes the next record of a datagram; `None` if its type is unknown.
    fn take(datagram: &mut Reader<'_>) -> Result<Option<Record>, RecordError> {
        let [kind, len] = datagram.array()?;
        let mut value = Reader(datagram.slice(usize::from(len))?);
        if !(kind::OPEN..=kind::LOST).contains(&kind) {
            return Ok(None);
        }
        let flow = FlowKey {
            client_addr: value.u32()?,
            client_port: value.u16()?,
            service_port: value.u16()?,
        };
        let number = value.u32()?;
        let client_isn = number;
        let record = match kind {
            kind::OPEN | kind::KNOWN => {
                let open = Open {
                    flow,
                    client_isn,
                    active_isn: value.u32()?,
                    client_window: value.u16()?,
                    client: options_from_bytes(value.array()?)?,
                    active: options_from_bytes(value.array()?)?,
                };
                if kind == kind::OPEN {
                    Record::Open(open)
                } else {
                    Record::Known(open)
                }
            }
            kind::CONFIRM => Record::Confirm(Confirm {
                flow,
                client_isn,
                ack: value.u32()?,
                edge: value.u32()?,
                sack: take_sack(&mut value)?,
            }),
            kind::REFUSE => Record::Refuse { flow, client_isn },
            kind::CLOSE => Record::Close { flow, client_isn },
            kind::TOLD => Record::Told {
                flow,
                client_isn,
                ack: value.u32()?,
            },
            kind::OFFER => Record::Offer(Offer {
                flow,
                join: number,
                client_isn: value.u32()?,
                next: value.u32()?,
            }),
            kind::PART => Record::Part(take_part(&mut value, flow, number)?),
            kind::GOT => Record::Got {
                flow,
                join: number,
                next: value.u32()?,
            },
            kind::DECLINE => Record::Decline { flow, join: number },
            _ => Record::Lost { flow, join: number },
        };
        if value.0.is_empty() {
            Ok(Some(record))
        } else {
            Err(RecordError {
                field: "record length",
            })
        }
    }
}

/// The records of a datagram, each of which was checked before the first is handed out.
#[derive(Clone, Debug)]
pub struct Records<'a> {
    rest: &'a [u8],
    skipped: u64,
}

impl<'a> Records<'a> {
    /// Checks all records that stand in `bytes`.
    ///
    /// # Errors
    /// The first record that is cut short, too long for its type, or holds what no agent writes.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, RecordError> {
        let mut reader = Reader(bytes);
        let mut skipped = 0;
        while !reader.0.is_empty() {
            skipped += u64::from(Record::take(&mut reader)?.is_none());
        }
        Ok(Self {
            rest: bytes,
            skipped,
        })
    }

    /// How many records of unknown types are stepped over.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }
}

impl Iterator for Records<'_> {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        let mut reader = Reader(self.rest);
        // No error: `parse` has seen them all.
        while let Ok(record) = Record::take(&mut reader) {
            self.rest = reader.0;
            if record.is_some() {
                return record;
            }
        }
        None
    }
}

fn take_part(value: &mut Reader<'_>, flow: FlowKey, join: u32) -> Result<Part, RecordError> {
    let part = Part {
        flow,
        join,
        total: value.u32()?,
        offset: value.u32()?,
        bytes: std::mem::take(&mut value.0).into(),
    };
    let whole = part.total as usize;
    let end = (part.offset as usize).checked_add(part.bytes.len());
    let lies_within = end.is_some_and(|end| end <= whole) && whole <= MAX_SNAPSHOT;
    if lies_within && !part.bytes.is_empty() {
        Ok(part)
    } else {
        Err(RecordError {
            field: "part of a snapshot",
        })
    }
}

fn take_sack(value: &mut Reader<'_>) -> Result<Sack, RecordError> {
    let mut sack = Sack::default();
    for place in &mut sack.blocks {
        if value.0.is_empty() {
            break;
        }
        *place = (value.u32()?, value.u32()?);
        sack.len += 1;
    }
    Ok(sack)
}

/// Bits of the first byte of options: which of them there are.
mod present {
    pub const MSS: u8 = 1;
    pub const WINDOW_SCALE: u8 = 2;
    pub const SACK_PERMITTED: u8 = 4;
    pub const TIMESTAMP: u8 = 8;
}

pub(super) fn options_to_bytes(options: &Options) -> [u8; OPTIONS_LEN] {
    let present = [
        (options.mss.is_some(), present::MSS),
        (options.window_scale.is_some(), present::WINDOW_SCALE),
        (options.sack_permitted, present::SACK_PERMITTED),
        (options.timestamp.is_some(), present::TIMESTAMP),
    ];
    let (tsval, tsecr) = options.timestamp.unwrap_or_default();
    let mut bytes = [0; OPTIONS_LEN];
    bytes[0] = present
        .iter()
        .filter(|(is, _)| *is)
        .map(|(_, bit)| bit)
        .sum();
    bytes[1] = options.window_scale.unwrap_or_default();
    bytes[2..4].copy_from_slice(&options.mss.unwrap_or_default().to_be_bytes());
    bytes[4..8].copy_from_slice(&tsval.to_be_bytes());
    bytes[8..].copy_from_slice(&tsecr.to_be_bytes());
    bytes
}

pub(super) fn options_from_bytes(bytes: [u8; OPTIONS_LEN]) -> Result<Options, RecordError> {
    let [present, shift, m0, m1, v0, v1, v2, v3, e0, e1, e2, e3] = bytes;
    let has = |bit| present & bit != 0;
    let timestamp = (
        u32::from_be_bytes([v0, v1, v2, v3]),
        u32::from_be_bytes([e0, e1, e2, e3]),
    );
    let options = Options {
        mss: has(present::MSS).then_some(u16::from_be_bytes([m0, m1])),
        window_scale: has(present::WINDOW_SCALE).then_some(shift),
        sack_permitted: has(present::SACK_PERMITTED),
        timestamp: has(present::TIMESTAMP).then_some(timestamp),
    };
    // Unknown bits, and values of options that are not there.
    if options_to_bytes(&options) != bytes {
        return Err(RecordError { field: "options" });
    }
    // RFC 7323 section 2.3.
    if shift > 14 {
        return Err(RecordError {
            field: "window shift",
        });
    }
    Ok(options)
}
