//! Deliberate faults, for the simulation that must catch them. In an agent there are none: without the feature
//! `simulation` nothing of this is compiled.

/// Whether this fault is on. `false`, a constant, without the feature `simulation`.
#[cfg(any(test, feature = "simulation"))]
macro_rules! faulty {
    ($fault:ident) => {
        $crate::fault::is_on($crate::fault::Fault::$fault)
    };
}
#[cfg(not(any(test, feature = "simulation")))]
macro_rules! faulty {
    ($fault:ident) => {
        false
    };
}
pub(crate) use faulty;

#[cfg(any(test, feature = "simulation"))]
pub use faults::*;

#[cfg(any(test, feature = "simulation"))]
mod faults {
    use std::cell::Cell;

    /// Something that the simulation must notice.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub enum Fault {
        /// The gate lets pure acknowledgements pass that the standby has not confirmed.
        HoldNothing,
        /// The gate does not lower the acknowledgement of data that it lets pass.
        LowerNoAck,
        /// The gate does not lower the window to what the standby can take.
        LowerNoWindow,
        /// The gate releases a SYN-ACK before the standby knows of the connection.
        ReleaseUnknown,
        /// The standby's program answers for a SYN-ACK that is not in its ring.
        AnswerLost,
        /// The standby's program confirms bytes that are not in its ring.
        PledgeLost,
        /// The gate holds no FIN of an agent that was killed.
        ApproveAll,
        /// The gate does not look at the lease.
        IgnoreLease,
        /// The standby confirms one byte more than it holds.
        ConfirmTooMuch,
        /// The lease is longer than the takeover time.
        LongLease,
        /// The standby takes over before the deadline.
        TakeOverEarly,
        /// A standby goes by the clock, and not by what lies in the heartbeat ring.
        SkipRing,
        /// An active does not yield to a higher epoch.
        IgnoreEpoch,
        /// A node whose cable is cut goes on as if it were not.
        IgnoreCarrier,
        /// A node takes sync datagrams that came before.
        AcceptReplays,
        /// A live shadow speaks one byte off.
        SpeakOneOff,
        /// A poke uses the client's next number instead of one that is acknowledged.
        PokeAhead,
        /// A flow of which its client was told more than the standby holds is called guarded.
        ForgetExposed,
        /// The active goes on guarding for a standby that was started anew.
        ForgetRestart,
        /// The handler begins anew when a flow is handed over.
        RestoreNoHandler,
        /// The VIP is offered to the standby before the gate is closed.
        OfferTooEarly,
        /// Handshakes that are under way are forgotten at a takeover.
        ForgetOpenings,
        /// What the kernel had not given to the handler is lost when a live shadow is adopted.
        AdoptNoInput,
    }

    impl Fault {
        /// All of them.
        pub const ALL: [Fault; 23] = [
            Fault::HoldNothing,
            Fault::LowerNoAck,
            Fault::LowerNoWindow,
            Fault::ReleaseUnknown,
            Fault::AnswerLost,
            Fault::PledgeLost,
            Fault::ApproveAll,
            Fault::IgnoreLease,
            Fault::ConfirmTooMuch,
            Fault::LongLease,
            Fault::TakeOverEarly,
            Fault::SkipRing,
            Fault::IgnoreEpoch,
            Fault::IgnoreCarrier,
            Fault::AcceptReplays,
            Fault::SpeakOneOff,
            Fault::PokeAhead,
            Fault::ForgetExposed,
            Fault::ForgetRestart,
            Fault::RestoreNoHandler,
            Fault::OfferTooEarly,
            Fault::ForgetOpenings,
            Fault::AdoptNoInput,
        ];
    }

    thread_local! {
        static ON: Cell<Option<Fault>> = const { Cell::new(None) };
    }

    /// Whether this fault is on in this thread.
    pub fn is_on(fault: Fault) -> bool {
        ON.get() == Some(fault)
    }

    /// Turns a fault on in this thread, and what was on off.
    pub fn turn_on(fault: Option<Fault>) {
        ON.set(fault);
    }
}
