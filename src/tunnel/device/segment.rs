//! Cuts what the kernel sent at once into packets.
//!
//! A TCP sender, or the kernel's GRO before us, hands over up to 64 KiB at a time. That goes through
//! the host's rules once instead of 45 times, and comes to us in one read. So do datagrams that a
//! program sent in one call (`UDP_SEGMENT`), or that came through another hop in one.

use super::offload::{
    Kind, Offload, Sum, TCP_CHECKSUM, UDP_CHECKSUM, complete_checksum, set_length,
};

const TCP: u8 = 6;
const UDP: u8 = 17;
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
    let Some((transport, headers)) = headers_of(packet, offload) else {
        return false;
    };
    let is_stream = offload.kind != Kind::Udp;
    let (headers, payload) = packet.split_at(headers);
    let size = match largest.saturating_sub(headers.len()) {
        fits if is_stream && fits >= LEAST => offload.size.min(fits),
        _ => offload.size,
    };
    let is_v4 = headers[0] >> 4 == 4;
    let identification = u16::from_be_bytes([headers[4], headers[5]]);
    // Of UDP these are its length and checksum, which are set anew.
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
            if is_v4 {
                let identification = identification.wrapping_add(index as u16);
                out[4..6].copy_from_slice(&identification.to_be_bytes());
            }
            set_length(out, length);
            if is_stream {
                // A sequence number wraps, and `from` is less than 64 Ki.
                let sequence = sequence.wrapping_add(from as u32);
                out[transport + 4..transport + 8].copy_from_slice(&sequence.to_be_bytes());
                if index + 1 < count {
                    out[transport + 13] &= !LAST_ONLY;
                }
                if index > 0 {
                    out[transport + 13] &= !FIRST_ONLY;
                }
            } else {
                let length = (length - transport) as u16;
                out[transport + 4..transport + 6].copy_from_slice(&length.to_be_bytes());
            }
            let (protocol, checksum) = if is_stream {
                (TCP, TCP_CHECKSUM)
            } else {
                (UDP, UDP_CHECKSUM)
            };
            let at = transport + checksum;
            let pseudo = Sum::default()
                .add_pseudo(out, protocol, length - transport)
                .folded();
            out[at..at + 2].copy_from_slice(&pseudo);
            complete_checksum(out, (transport, checksum));
        });
    }
    true
}

/// Where the transport header and the payload of a packet begin that is to be cut, if it is what
/// its header says.
fn headers_of(packet: &[u8], offload: Offload) -> Option<(usize, usize)> {
    let version = packet.first()? >> 4;
    let (transport, checksum) = offload.checksum?;
    let is_udp = offload.kind == Kind::Udp;
    let headers = if is_udp {
        transport + 8
    } else {
        transport + usize::from(packet.get(transport + 12)? >> 4) * 4
    };
    let fits = match (version, offload.kind) {
        (4, Kind::Tcp4 | Kind::Udp) => transport >= usize::from(packet[0] & 0xf) * 4,
        (6, Kind::Tcp6 | Kind::Udp) => transport >= 40,
        _ => false,
    };
    let right = fits
        && transport >= 20
        && checksum == if is_udp { UDP_CHECKSUM } else { TCP_CHECKSUM }
        && headers >= transport + if is_udp { 8 } else { 20 }
        && headers <= packet.len()
        && offload.size > 0;
    right.then_some((transport, headers))
}
