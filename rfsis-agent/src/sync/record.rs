//! placeholder until the channel lands
use rfsis_common::maps::FlowKey;

use crate::segment::Options;

/// A flow is being opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    pub flow: FlowKey,
    pub client_isn: u32,
    pub active_isn: u32,
    pub client_window: u16,
    pub client: Options,
    pub active: Options,
}

/// Ranges held beyond a hole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sack {
    blocks: [(u32, u32); 4],
    len: u8,
}

impl Sack {
    /// The blocks
    pub fn blocks(&self) -> &[(u32, u32)] {
        &self.blocks[..usize::from(self.len)]
    }
}

impl FromIterator<(u32, u32)> for Sack {
    fn from_iter<I: IntoIterator<Item = (u32, u32)>>(blocks: I) -> Self {
        let mut sack = Self::default();
        for (place, block) in sack.blocks.iter_mut().zip(blocks) {
            *place = block;
            sack.len += 1;
        }
        sack
    }
}

/// What the standby holds of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confirm {
    pub flow: FlowKey,
    pub client_isn: u32,
    pub ack: u32,
    pub edge: u32,
    pub sack: Sack,
}

/// A record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    Open(Open),
    Confirm(Confirm),
    Refuse {
        flow: FlowKey,
        client_isn: u32,
    },
    Close {
        flow: FlowKey,
        client_isn: u32,
    },
    Told {
        flow: FlowKey,
        client_isn: u32,
        ack: u32,
    },
}
