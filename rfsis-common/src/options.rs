//! The options of a TCP header that the ACK gate is about: timestamps and SACK.

use crate::frame::{Frame, TcpPart};

/// Bytes of a TCP header without options.
const HEADER_LEN: usize = 20;
/// Bytes of a header whose only options are two NOPs and timestamps, which is what nearly all have.
const HEADER_LEN_TIMESTAMPS: usize = 32;
/// Most bytes of options, and so the most there can be of them.
const OPTIONS_MAX: usize = 40;

/// Kinds of options (IANA): end, no-operation, SACK (RFC 2018), timestamps (RFC 7323).
const END: u8 = 0;
const NOP: u8 = 1;
const SACK: u8 = 5;
const TIMESTAMPS: u8 = 8;
/// Bytes of a timestamp option.
const TIMESTAMPS_LEN: u8 = 10;

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
    if tcp.header_len <= HEADER_LEN {
        return options;
    }
    let mut at = tcp.offset + HEADER_LEN;
    let end = tcp.offset + tcp.header_len;
    // Linux puts them first, and mostly alone (`tcp_options_write`, net/ipv4/tcp_output.c).
    if tcp.header_len >= HEADER_LEN_TIMESTAMPS
        && let Some([NOP, NOP, TIMESTAMPS, TIMESTAMPS_LEN, rest @ ..]) = frame.load::<12>(at)
    {
        options.note_timestamp(rest);
        if tcp.header_len == HEADER_LEN_TIMESTAMPS {
            return options;
        }
        at += 12;
    }
    for _ in 0..OPTIONS_MAX {
        if at >= end {
            break;
        }
        // Where the frame ends behind its last option, that is a NOP or the end.
        let Some([kind]) = frame.load::<1>(at) else {
            break;
        };
        if kind == END {
            break;
        }
        if kind == NOP {
            at += 1;
            continue;
        }
        let Some([len]) = frame.load::<1>(at + 1) else {
            break;
        };
        let next = at + len as usize;
        if len < 2 || next > end {
            break;
        }
        if kind == TIMESTAMPS
            && len == TIMESTAMPS_LEN
            && let Some(values) = frame.load::<8>(at + 2)
        {
            options.note_timestamp(values);
        }
        if kind == SACK {
            options.sack_offset = at;
            options.sack_len = len as usize;
            // Nothing behind it is of interest: Linux puts it last of the two.
            break;
        }
        at = next;
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
    fn timestamps_and_sack_are_found_wherever_they_stand() {
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
        let odd = read(&[&[1][..], &STAMP, &[5, 10], &[0; 8], &[0; 3]].concat());
        assert!(stamped(odd));
        assert_eq!((odd.sack_offset, odd.sack_len), (34 + 20 + 11, 10));
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
        assert_eq!(read(&[NOP; OPTIONS_MAX]), TcpOptions::default());
        let mut last = [NOP; OPTIONS_MAX];
        last[38..].copy_from_slice(&[SACK, 2]);
        assert_eq!(read(&last).sack_offset, 34 + 20 + 38);
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
