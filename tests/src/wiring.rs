//! How the VIP's frames reach the standby: a scenario that must hold with every tap is written once
//! and run on each [`Wiring`] by [`on_each_wiring!`](crate::on_each_wiring).

use crate::agent::{Settings, Tap};
use crate::lab::{Bridge, Lab, LabOptions, SYNC_INTERFACE};

/// A LAN with agents whose tap fits it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wiring {
    /// The bridge floods, as a hub; tap `lan`.
    Lan,
    /// The bridge learns, as every switch does; tap `mirror`, and no ACK gate.
    MirrorAsync,
    /// The same with the ACK gate: `protect: sync`, as by default.
    Mirror,
    /// The same, with super-frames and unfinished checksums as network cards have them; TC catches them, as on
    /// any veth.
    MirrorOffloaded,
    /// The same as [`Wiring::Mirror`], with the copies on a cable of their own between the nodes; TC.
    MirrorOverSyncLink,
}

impl Wiring {
    /// The LAN.
    ///
    /// # Panics
    /// As [`Lab::with`].
    pub fn lab(self) -> Lab {
        self.lab_with(LabOptions::default())
    }

    /// The LAN, with options that are not the wiring's.
    ///
    /// # Panics
    /// As [`Lab::with`].
    pub fn lab_with(self, options: LabOptions) -> Lab {
        Lab::with(&self.options(options))
    }

    /// How the LAN is built, with options that are not the wiring's.
    pub fn options(self, options: LabOptions) -> LabOptions {
        LabOptions {
            bridge: match self {
                Wiring::Lan => Bridge::Flooding,
                _ => Bridge::Learning,
            },
            offloads: self == Wiring::MirrorOffloaded,
            sync_link: self == Wiring::MirrorOverSyncLink,
            ..options
        }
    }

    /// What the agents are told.
    pub fn settings(self) -> Settings {
        Settings {
            tap: match self {
                Wiring::Lan => Tap::Lan,
                Wiring::MirrorAsync | Wiring::Mirror | Wiring::MirrorOffloaded => Tap::Mirror,
                Wiring::MirrorOverSyncLink => Tap::MirrorOver(SYNC_INTERFACE),
            },
            native_xdp: !matches!(self, Wiring::MirrorOffloaded | Wiring::MirrorOverSyncLink),
            sync: !matches!(self, Wiring::Lan | Wiring::MirrorAsync),
            ..Settings::default()
        }
    }
}

/// Makes a module of tests for each wiring named: `module: Wiring`, then `test => |wiring| …`.
#[macro_export]
macro_rules! on_each_wiring {
    ([$($module:ident: $wiring:ident),+ $(,)?] $tests:tt) => {
        $($crate::on_wiring!($module $wiring $tests);)+
    };
}

/// One module of [`on_each_wiring!`].
#[macro_export]
macro_rules! on_wiring {
    ($module:ident $wiring:ident { $($name:ident => $scenario:expr;)+ }) => {
        mod $module {
            use super::*;
            $(#[test]
            fn $name() {
                let scenario: fn($crate::Wiring) = $scenario;
                scenario($crate::Wiring::$wiring);
            })+
        }
    };
}
