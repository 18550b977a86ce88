//! The options of a TCP header that the ACK gate is about: timestamps and SACK, as Linux writes them.
//!
//! Linux begins each option at a multiple of four bytes, some behind two NOPs, in one order: a signature
//! (MD5 or AO), timestamps, SACK, the rest (`tcp_options_write`,
//! net/ipv4/tcp_output.c). So SACK is the third at the latest. A walk byte by byte, as for anybody's options,
//! is more than the verifier follows.

use crate::frame::{Frame, TcpPart};

/// Bytes of a TCP header without options.
const HEADER_LEN: usize = 20;
/// Options to look at: SACK is among them, if there is one.
const STEPS: usize = 3;

/// Kinds of options (IANA): no-operation, SACK (RFC 2018), timestamps (RFC 7323).
pub const NOP: u8 = 1;
const SACK: u8 = 5;
const TIMESTAMPS: u8 = 8;
/// Bytes of a timestamp option.
const TIMESTAMPS_LEN: u8 = 10;

/// Two NOPs, and the beginning of a timestamp option; the length of all three.
const ALIGNED_TIMESTAMPS: u32 = u32::from_be_bytes([NOP, NOP, TIMESTAMPS, TIMESTAMPS_LEN]);
const ALIGNED_TIMESTAMPS_LEN: usize = 12;

/// Bytes of a SACK option of one block.
pub const ONE_BLOCK: usize = 10;

/// Whether a SACK block that ends at `right` says only what has come twice (RFC 2883): all of it is acknowledged. A sender
/// that does not hear of that takes its own repetition for the remedy of a loss, and slows down.
#[inline(always)]
pub const fn is_told(ack: u32, right: u32) -> bool {
    ack.wrapping_sub(right) as i32 >= 0
}

/// What was found. Flat, for the verifier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpOptions {
    /// There is a timestamp option.
    pub has_timestamp: bool,
    /// Its value.
    pub tsval: u32,
    /// Its echo.
    pub tsecr: u32,
    /// Bytes from the start of the frame to the first SACK option; 0 if there is none.
    pub sack_offset: usize,
    /// Its bytes: kind, length, blocks.
    pub sack_len: usize,
}

impl TcpOptions {
    #[inline(always)]
    fn note_timestamp(&mut self, [a, b, c, d, e, f, g, h]: [u8; 8]) {
        self.has_timestamp = true;
        self.tsval = u32::from_be_bytes([a, b, c, d]);
        self.tsecr = u32::from_be_bytes([e, f, g, h]);
    }
}

/// Reads the options of a segment, up to the first that contradicts itself.
#[inline(always)]
pub fn tcp_options<F: Frame>(frame: &F, tcp: &TcpPart) -> TcpOptions {
    let mut options = TcpOptions::default();
    let mut at = tcp.offset + HEADER_LEN;
    let end = tcp.offset + tcp.header_len;
    let mut steps = STEPS;
    // Nearly always the first, and the only ones.
    if at + ALIGNED_TIMESTAMPS_LEN <= end
        && let Some([ALIGNED_TIMESTAMPS, tsval, tsecr]) = frame.words(at)
    {
        options.has_timestamp = true;
        (options.tsval, options.tsecr) = (tsval, tsecr);
        at += ALIGNED_TIMESTAMPS_LEN;
        steps -= 1;
    }
    for _ in 0..steps {
        if at >= end {
            break;
        }
        let Some([a, b, c, d]) = frame.load::<4>(at) else {
            break;
        };
        let padded = a == NOP && b == NOP;
        let (start, kind, len) = if padded { (at + 2, c, d) } else { (at, a, b) };
        let past = start + len as usize;
        if len < 2 || past > end {
            break;
        }
        if kind == SACK {
            options.sack_offset = start;
            options.sack_len = len as usize;
            break;
        }
        if kind == TIMESTAMPS
            && len == TIMESTAMPS_LEN
            && let Some(values) = frame.load::<8>(start + 2)
        {
            options.note_timestamp(values);
        }
        // From one multiple of four behind the start of the header to the next.
        at += (past - at + 3) & !3;
    }
    options
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec::Vec;

    use super::*;
    use crate::frame::classify;
    use crate::frame::tcp_flags::ACK;
    use crate::frame::testing::{VIP, tcp_from_vip};

    /// A segment with these options and a byte of data behind them.
    fn segment(options: &[u8]) -> Vec<u8> {
        assert_eq!(options.len() % 4, 0);
        let mut frame = tcp_from_vip(ACK).to_vec();
        frame[17] = 41 + options.len() as u8;
        frame[46] = ((5 + options.len() / 4) as u8) << 4;
        frame.extend_from_slice(options);
        frame.push(SACK);
        frame
    }

    fn read(options: &[u8]) -> TcpOptions {
        let frame = segment(options);
        let frame = &frame[..];
        let classified = classify(&frame, VIP);
        let tcp = classified.tcp().unwrap();
        assert_eq!((tcp.offset, tcp.header_len), (34, 20 + options.len()));
        assert_eq!(tcp.payload, 1);
        tcp_options(&frame, tcp)
    }

    const STAMP: [u8; 10] = [8, 10, 0, 0, 0, 7, 0, 0, 0, 9];

    fn stamped(options: TcpOptions) -> bool {
        (options.has_timestamp, options.tsval, options.tsecr) == (true, 7, 9)
    }

    #[test]
    fn timestamps_and_sack_are_found_wherever_linux_puts_them() {
        assert_eq!(read(&[]), TcpOptions::default());
        let alone = [&[1, 1][..], &STAMP].concat();
        assert!(stamped(read(&alone)));
        assert_eq!(read(&alone).sack_len, 0);

        let block = [1, 1, 5, 10, 1, 2, 3, 4, 5, 6, 7, 8];
        let found = read(&block);
        assert_eq!((found.sack_offset, found.sack_len), (34 + 22, 10));
        assert!(!found.has_timestamp);

        let both = read(&[&alone[..], &block].concat());
        assert!(stamped(both));
        assert_eq!((both.sack_offset, both.sack_len), (34 + 34, 10));

        // Behind an MD5 signature, whose bytes mean nothing here.
        let md5 = [&[1, 1, 19, 18][..], &[5; 16]].concat();
        let behind = read(&[&md5[..], &alone].concat());
        assert!(stamped(behind));
        assert_eq!(behind.sack_len, 0);
        let behind = read(&[&md5[..], &block].concat());
        assert_eq!((behind.sack_offset, behind.sack_len), (34 + 42, 10));
    }

    #[test]
    fn options_that_contradict_themselves_end_the_search() {
        for bad in [
            [8, 0, 5, 2],
            [8, 1, 5, 2],
            [8, 5, 5, 2],
            [0, 5, 2, 2],
            [5, 1, 5, 2],
            [5, 5, 5, 2],
            [5, 255, 5, 2],
            [1, 1, 1, 5],
            [1, 1, 8, 10],
        ] {
            assert_eq!(read(&bad), TcpOptions::default(), "{bad:?}");
        }
        assert_eq!(read(&[NOP; 40]), TcpOptions::default());
    }

    #[test]
    fn a_header_that_reaches_beyond_its_frame_is_read_no_further_than_that() {
        let mut frame = tcp_from_vip(ACK);
        for words in 0..=15 {
            frame[46] = words << 4;
            let frame = &frame[..];
            let classified = classify(&frame, VIP);
            let tcp = classified.tcp().unwrap();
            assert_eq!(tcp.payload, 20_u32.saturating_sub(4 * u32::from(words)));
            assert_eq!(tcp_options(&frame, tcp), TcpOptions::default());
        }
    }
}
