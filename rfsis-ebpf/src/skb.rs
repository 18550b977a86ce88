//! A socket buffer as a frame; what both TC programs read of it.

use aya_ebpf::programs::TcContext;
use rfsis_common::frame::Frame;

/// A frame in a socket buffer.
pub struct SkbFrame<'a>(pub &'a TcContext);

impl Frame for SkbFrame<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        // By helper, not by packet pointer: headers may lie outside the linear part.
        self.0.load::<[u8; N]>(offset).ok()
    }

    #[inline(always)]
    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        let words = self.0.load::<[u32; N]>(offset).ok()?;
        Some(words.map(u32::from_be))
    }

    #[inline(always)]
    fn frame_len(&self) -> usize {
        self.0.len() as usize
    }
}

/// Whether a VLAN tag (id ≠ 0) lies beside the frame, where the kernel keeps it: then the frame belongs
/// to another interface, though its bytes look untagged.
#[inline(always)]
pub fn is_tagged(ctx: &TcContext) -> bool {
    // SAFETY: the context is the one that the kernel gave.
    unsafe { (*ctx.skb.skb).vlan_present != 0 && (*ctx.skb.skb).vlan_tci & 0x0fff != 0 }
}

/// Whether the frame is addressed to this host. The kernel drops what the network merely brought along.
#[inline(always)]
pub fn is_for_this_host(ctx: &TcContext) -> bool {
    /// `PACKET_HOST`, include/uapi/linux/if_packet.h.
    const PACKET_HOST: u32 = 0;
    // SAFETY: the context is the one that the kernel gave.
    unsafe { (*ctx.skb.skb).pkt_type == PACKET_HOST }
}

/// The mark that the sender gave it.
#[inline(always)]
pub fn mark(ctx: &TcContext) -> u32 {
    // SAFETY: the context is the one that the kernel gave.
    unsafe { (*ctx.skb.skb).mark }
}
