//! What a frame is does not depend on how it is read.

use proptest::collection::vec;
use proptest::prelude::*;
use rfsis_common::frame::{Frame, classify};
use rfsis_common::options::tcp_options;

const VIP: u32 = 0xc0a8_0164;

/// A frame that cannot be read in large pieces: nothing finds all headers, or a whole timestamp option, at once.
struct Piecewise<'a>(&'a [u8]);

impl Frame for Piecewise<'_> {
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.load(offset)
    }

    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        let is_header = N == 4 || N == 5;
        is_header.then(|| self.0.words(offset)).flatten()
    }

    fn frame_len(&self) -> usize {
        self.0.len()
    }
}

prop_compose! {
    /// Ethernet, IPv4 and TCP headers with options behind both, then what may be cut off; some bytes are wrong.
    fn frame()(
        tag in prop_oneof![4 => Just(None), 1 => any::<u16>().prop_map(Some), 1 => Just(Some(0xe000))],
        from_vip in any::<bool>(),
        ihl in prop_oneof![4 => Just(5_u8), 1 => 0..16_u8],
        version in prop_oneof![9 => Just(4_u8), 1 => 0..16_u8],
        protocol in prop_oneof![9 => Just(6_u8), 1 => any::<u8>()],
        fragment in prop_oneof![9 => Just(0x4000_u16), 1 => any::<u16>()],
        tcp in vec(any::<u8>(), 20),
        options in prop_oneof![
            3 => vec(any::<u8>(), 8).prop_map(|stamp| [&[1, 1, 8, 10], &stamp[..]].concat()),
            2 => (vec(any::<u8>(), 8), vec(any::<u8>(), 8)).prop_map(|(stamp, block)| {
                [&[1, 1, 8, 10], &stamp[..], &[1, 1, 5, 10], &block[..]].concat()
            }),
            2 => Just(vec![]),
            2 => vec(prop_oneof![Just(1), Just(5), Just(8), Just(10), any::<u8>()], 0..40),
        ],
        data in vec(any::<u8>(), 0..8),
        cut in prop_oneof![4 => Just(usize::MAX), 1 => 0..80_usize],
        wrong in vec((any::<prop::sample::Index>(), any::<u8>()), 0..2),
    ) -> Vec<u8> {
        let mut frame = vec![2; 12];
        if let Some(tag) = tag {
            frame.extend([0x81, 0]);
            frame.extend(tag.to_be_bytes());
        }
        frame.extend([8, 0]);
        let mut tcp = [&tcp[..], &options].concat();
        tcp[12] = (5 + options.len().div_ceil(4) as u8) << 4;
        let header = 4 * usize::from(ihl).max(5);
        let len = (header + tcp.len() + data.len()) as u16;
        let mut ip = vec![0; header];
        ip[0] = version << 4 | ihl;
        ip[2..4].copy_from_slice(&len.to_be_bytes());
        ip[6..8].copy_from_slice(&fragment.to_be_bytes());
        ip[9] = protocol;
        let vip = if from_vip { 12..16 } else { 16..20 };
        ip[vip].copy_from_slice(&VIP.to_be_bytes());
        frame.extend(ip);
        frame.extend(tcp);
        frame.extend(data);
        frame.truncate(cut);
        for (index, byte) in wrong {
            if !frame.is_empty() {
                let at = index.index(frame.len());
                frame[at] = byte;
            }
        }
        frame
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn one_look_at_a_frame_sees_what_many_see(frame in frame()) {
        let frame = &frame[..];
        let whole = classify(&frame, VIP);
        prop_assert_eq!(whole, classify(&Piecewise(frame), VIP));
        if let Some(tcp) = whole.tcp() {
            prop_assert_eq!(tcp_options(&frame, tcp), tcp_options(&Piecewise(frame), tcp));
        }
    }
}
