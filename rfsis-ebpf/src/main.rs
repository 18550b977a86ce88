//! The programs of RFSIS in the kernel. Thin: parse (`rfsis_common::frame`), look up ([`maps`]),
//! decide (`rfsis_common::verdict`), act, count.
//!
//! Read [`xdp`] and [`ingress`] (the two hooks on ingress), [`capture`] (who sees a frame), [`gate`] (egress:
//! who may speak), [`ack_gate`] (what a client is told), [`mirror`] (what the active copies to the standby), and what
//! the two kernels say to each other: [`pledge`] and [`prompt`] (confirmations), and [`agree`] (openings).
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod ack_gate;
mod agree;
mod atomic;
mod capture;
mod clock;
mod gate;
mod ingress;
mod maps;
mod mirror;
mod pledge;
mod prompt;
mod skb;
mod xdp;

/// The helpers for ring buffers and time are open to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Never reached: the verifier would refuse a program from which a panic is reachable.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
