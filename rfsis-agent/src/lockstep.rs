//! The arithmetic that ties a shadow's sequence space to the active's.
//!
//! The client's sequence numbers are the same for both. The server's differ: `P` is the active's
//! initial sequence number, `S` the shadow's own, and `delta = P - S` modulo 2^32.

use crate::heartbeat::Nanos;

/// `a < b` in sequence space (RFC 9293 section 3.4), valid for distances below 2^31.
pub const fn before(a: u32, b: u32) -> bool {
    distance(b, a) < 0
}

/// How far `to` lies ahead of `from`; negative when behind.
pub const fn distance(from: u32, to: u32) -> i32 {
    to.wrapping_sub(from) as i32
}

/// The later of two sequence numbers.
pub const fn later(a: u32, b: u32) -> u32 {
    if before(a, b) { b } else { a }
}

/// The translation between the wire (the active's numbers) and the shadow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lockstep {
    delta: u32,
}

impl Lockstep {
    /// From the active's initial sequence number and the shadow's own.
    pub const fn new(active_isn: u32, shadow_isn: u32) -> Self {
        Self {
            delta: active_isn.wrapping_sub(shadow_isn),
        }
    }

    /// A number of the active's sequence space, as the shadow knows it.
    pub const fn to_shadow(self, wire: u32) -> u32 {
        wire.wrapping_sub(self.delta)
    }

    /// A number of the shadow's sequence space, as the client knows it.
    pub const fn to_wire(self, shadow: u32) -> u32 {
        shadow.wrapping_add(self.delta)
    }
}

/// What is left of an acknowledgement that must stay inside `[una, max]`: outside, smoltcp would
/// drop the segment together with its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClampedAck {
    /// The number to deliver now.
    pub now: u32,
    /// The number that was cut off, to be delivered when the handler has caught up.
    pub ahead: Option<u32>,
    /// The acknowledgement was older than `una`: its window must not be believed either.
    pub stale: bool,
}

/// Clamps an acknowledgement to `[una, max]`, all in the same sequence space.
pub const fn clamp_ack(ack: u32, una: u32, max: u32) -> ClampedAck {
    if before(ack, una) {
        ClampedAck {
            now: una,
            ahead: None,
            stale: true,
        }
    } else if before(max, ack) {
        ClampedAck {
            now: max,
            ahead: Some(ack),
            stale: false,
        }
    } else {
        ClampedAck {
            now: ack,
            ahead: None,
            stale: false,
        }
    }
}

/// The window field for `bytes` of room, scaled by the shift that the active announced (RFC 7323
/// section 2.2). Rounds down, as every stack does.
pub const fn window_field(bytes: u32, shift: u8) -> u16 {
    let scaled = bytes >> shift;
    if scaled > u16::MAX as u32 {
        u16::MAX
    } else {
        scaled as u16
    }
}

/// See [`TimestampClock::leap`]: ms, and one in so many.
const LEAP_MS: u32 = 2_000;
const LEAP_DRIFT: u64 = 5_000;

/// Continues the active's timestamp clock (RFC 7323 section 4): 1 ms a tick, as Linux ticks, and
/// never back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimestampClock {
    value: u32,
    at: Nanos,
}

impl TimestampClock {
    /// The active sent `value`, seen at `at`.
    pub const fn new(value: u32, at: Nanos) -> Self {
        Self { value, at }
    }

    /// The active sent another timestamp; an older one changes nothing.
    pub const fn observe(&mut self, value: u32, at: Nanos) {
        if !before(value, self.value) {
            self.value = value;
            self.at = at;
        }
    }

    /// Leaps ahead of all that the active can have sent at `now`, also where only its SYN-ACK was seen: that
    /// came up to [`LEAP_MS`] late, and two hosts' clocks differ by up to [`LEAP_DRIFT`]. Where the copy of its last
    /// segment was lost it is a tick that counts. A leap costs nothing: a client only compares (RFC 7323 section
    /// 5.3).
    pub const fn leap(&mut self, now: Nanos) {
        let elapsed = now.saturating_sub(self.at) / 1_000_000;
        let drift = (elapsed / LEAP_DRIFT) as u32;
        self.value = self.read(now).wrapping_add(LEAP_MS).wrapping_add(drift);
        self.at = now;
    }

    /// The value to send at `now`.
    pub const fn read(&self, now: Nanos) -> u32 {
        let ticks = now.saturating_sub(self.at) / 1_000_000;
        self.value.wrapping_add(ticks as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn translation_is_its_own_inverse(p: u32, s: u32, n: u32) {
            let lockstep = Lockstep::new(p, s);
            prop_assert_eq!(lockstep.to_wire(lockstep.to_shadow(n)), n);
            prop_assert_eq!(lockstep.to_wire(s), p);
        }

        #[test]
        fn a_clamped_ack_lies_inside_the_range_and_loses_nothing(
            una: u32, room in 0u32..1 << 20, offset in -(1i32 << 20)..1 << 21,
        ) {
            let max = una.wrapping_add(room);
            let ack = una.wrapping_add_signed(offset);
            let clamped = clamp_ack(ack, una, max);
            prop_assert!(!before(clamped.now, una) && !before(max, clamped.now));
            prop_assert_eq!(clamped.stale, offset < 0);
            prop_assert_eq!(clamped.ahead, (offset > room as i32).then_some(ack));
            if !clamped.stale && clamped.ahead.is_none() {
                prop_assert_eq!(clamped.now, ack);
            }
        }

        #[test]
        fn a_window_field_never_promises_more_than_there_is(bytes: u32, shift in 0u8..=14) {
            prop_assert!(u64::from(window_field(bytes, shift)) << shift <= u64::from(bytes));
        }

        #[test]
        fn the_timestamp_clock_never_steps_back(
            start: u32, steps in proptest::collection::vec((0u64..1 << 34, -5000i32..5000), 1..20),
        ) {
            let mut now = 0;
            let mut clock = TimestampClock::new(start, now);
            let mut last = clock.read(now);
            for (pause, jitter) in steps {
                now += pause;
                let seen = clock.read(now).wrapping_add_signed(jitter);
                // What is older than the last observation is ignored; what is newer moves it on.
                if jitter >= 0 {
                    clock.observe(seen, now);
                }
                let value = clock.read(now);
                prop_assert!(!before(value, last));
                last = value;
            }
        }
    }
}
