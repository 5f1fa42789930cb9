//! Cuts what the kernel sent at once into packets.
//!
//! A TCP sender, or the kernel's GRO before us, hands over up to 64 KiB at a time. That goes through
//! the host's rules once instead of 45 times, and comes to us in one read.

use super::offload::{Kind, Offload, Sum, TCP_CHECKSUM, complete_checksum, set_length};

const TCP: u8 = 6;
/// Flags of TCP that only the last packet has: FIN and PSH.
const LAST_ONLY: u8 = 0x09;
/// The flag of TCP that only the first packet has: CWR.
const FIRST_ONLY: u8 = 0x80;
/// The least payload for which the packets are made smaller than the sender wants them, in bytes.
/// TCP's smallest segment size (RFC 9293, 3.7.1).
const LEAST: usize = 536;

/// Makes packets of `packet`. Each is written into what `make` returns for its length.
///
/// `largest` is the size of the largest packet that goes through the tunnel without fragments. A
/// stream may be cut wherever one likes, so its packets are made to fit, unless that is too small.
///
/// Says whether the packet was what its header promised.
pub(super) fn cut(
    packet: &mut [u8],
    offload: Offload,
    largest: usize,
    mut make: impl FnMut(usize, &mut dyn FnMut(&mut [u8])),
) -> bool {
    if offload.kind == Kind::Single {
        if let Some(checksum) = offload.checksum {
            complete_checksum(packet, checksum);
        }
        make(packet.len(), &mut |out| out.copy_from_slice(packet));
        return true;
    }
    let Some((transport, TCP_CHECKSUM)) = offload.checksum else {
        return false;
    };
    let least_ip = if offload.kind == Kind::Tcp4 { 20 } else { 40 };
    let Some(&offset) = packet.get(transport + 12) else {
        return false;
    };
    let headers = transport + usize::from(offset >> 4) * 4;
    if transport < least_ip
        || headers < transport + 20
        || headers > packet.len()
        || offload.size == 0
    {
        return false;
    }
    let (headers, payload) = packet.split_at(headers);
    let size = match largest.saturating_sub(headers.len()) {
        fits if fits >= LEAST => offload.size.min(fits),
        _ => offload.size,
    };
    let identification = u16::from_be_bytes([headers[4], headers[5]]);
    let sequence = &headers[transport + 4..transport + 8];
    let sequence = u32::from_be_bytes([sequence[0], sequence[1], sequence[2], sequence[3]]);
    let count = payload.len().div_ceil(size).max(1);
    for index in 0..count {
        let from = index * size;
        let part = &payload[from..payload.len().min(from + size)];
        let length = headers.len() + part.len();
        make(length, &mut |out| {
            out[..headers.len()].copy_from_slice(headers);
            out[headers.len()..].copy_from_slice(part);
            if offload.kind == Kind::Tcp4 {
                let identification = identification.wrapping_add(index as u16);
                out[4..6].copy_from_slice(&identification.to_be_bytes());
            }
            set_length(out, length);
            // A sequence number wraps, and `from` is less than 64 Ki.
            let sequence = sequence.wrapping_add(from as u32);
            out[transport + 4..transport + 8].copy_from_slice(&sequence.to_be_bytes());
            if index + 1 < count {
                out[transport + 13] &= !LAST_ONLY;
            }
            if index > 0 {
                out[transport + 13] &= !FIRST_ONLY;
            }
            let at = transport + TCP_CHECKSUM;
            out[at..at + 2].fill(0);
            let sum = Sum::default()
                .add_pseudo(out, TCP, length - transport)
                .add(&out[transport..])
                .complement();
            out[at..at + 2].copy_from_slice(&sum);
        });
    }
    true
}
