//! What the nodes say about a planned handover: a standby asks for the VIP, and an active that does not
//! hand it over says why.

use std::fmt;

/// Whether a standby asks the active for the VIP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Wish {
    /// It does not.
    #[default]
    None = 0,
    /// It does, if no connection is lost by that.
    Asks = 1,
    /// It does, whatever is lost.
    Insists = 2,
}

impl Wish {
    /// The wish with this number, if there is one.
    pub const fn from_u8(value: u8) -> Option<Wish> {
        match value {
            0 => Some(Wish::None),
            1 => Some(Wish::Asks),
            2 => Some(Wish::Insists),
            _ => None,
        }
    }

    /// The wish of somebody who asks, or insists.
    pub const fn new(insists: bool) -> Wish {
        if insists { Wish::Insists } else { Wish::Asks }
    }
}

/// Why the VIP is not handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Objection {
    /// The node that is to hand it over is not active.
    NotActive = 1,
    /// No standby is heard.
    NoStandby = 2,
    /// The standby confirms nothing at present (`protect: sync`).
    Degraded = 3,
    /// Connections would be lost: the heartbeat says how many flows are at risk.
    AtRisk = 4,
    /// The standby was offered the VIP and did not take it.
    Unanswered = 5,
}

impl Objection {
    /// The objection with this number; `Some(None)` for 0, no objection.
    pub const fn from_u8(value: u8) -> Option<Option<Objection>> {
        Some(match value {
            0 => None,
            1 => Some(Objection::NotActive),
            2 => Some(Objection::NoStandby),
            3 => Some(Objection::Degraded),
            4 => Some(Objection::AtRisk),
            5 => Some(Objection::Unanswered),
            _ => return None,
        })
    }
}

impl fmt::Display for Objection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Objection::NotActive => "the node that is to hand the VIP over is not active",
            Objection::NoStandby => "no standby is heard: is the agent of the peer running?",
            Objection::Degraded => {
                "the standby confirms nothing at present: connections would be lost; is `sync_port` reachable?"
            }
            Objection::AtRisk => "connections would be lost",
            Objection::Unanswered => {
                "the standby did not take the VIP over in time, and the active goes on"
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_they_are_written_and_no_others() {
        for value in 0..=u8::MAX {
            let wish = Wish::from_u8(value);
            assert_eq!(wish.map(|wish| wish as u8), (value < 3).then_some(value));
            let objection = Objection::from_u8(value);
            let read = objection.map(|objection| objection.map_or(0, |objection| objection as u8));
            assert_eq!(read, (value < 6).then_some(value));
        }
    }
}
