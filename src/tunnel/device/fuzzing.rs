//! The door to the private readers: see [`crate::fuzzing`].

use super::merge::Run;
use super::offload::{self, Offload};
use super::segment;

/// Packets: cut as the kernel's header says, or put together and cut apart again, which gives the same.
pub(crate) fn packets(how: u8, bytes: &[u8]) {
    let largest = usize::from(how >> 1) * 64;
    if how & 1 == 0 {
        let Some((header, packet)) = bytes.split_first_chunk() else {
            return;
        };
        let cut = cut(*header, packet, largest);
        assert!(cut.iter().map(Vec::len).sum::<usize>() >= packet.len() || cut.is_empty());
        return;
    }
    // Each behind its length.
    let mut packets = Vec::new();
    let mut rest = bytes;
    while let Some((length, behind)) = rest.split_first_chunk() {
        let length = usize::from(u16::from_be_bytes(*length)).min(behind.len());
        let (packet, behind) = behind.split_at(length);
        packets.push(packet.to_vec());
        rest = behind;
    }
    let mut run = Run::new(how & 2 == 0);
    let mut again: Vec<Vec<u8>> = Vec::new();
    let mut apart = |frame: Option<&[u8]>| {
        if let Some((header, packet)) = frame.and_then(<[u8]>::split_first_chunk) {
            again.extend(cut(*header, packet, usize::MAX));
        }
    };
    for packet in &packets {
        if run.add(packet) {
            continue;
        }
        apart(run.take());
        if !run.begin(packet) {
            apart(Some(&[&[0; offload::LENGTH], packet.as_slice()].concat()));
        }
    }
    apart(run.take());
    let carried = |packets: &[Vec<u8>]| packets.iter().map(Vec::len).sum::<usize>();
    assert_eq!(again.len(), packets.len());
    assert_eq!(carried(&again), carried(&packets));
}

fn cut(header: [u8; offload::LENGTH], packet: &[u8], largest: usize) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    if let Some(offload) = Offload::parse(header) {
        segment::cut(&mut packet.to_vec(), offload, largest, |length, fill| {
            let mut out = vec![0; length];
            fill(&mut out);
            packets.push(out);
        });
    }
    packets
}

/// Packets of a stream and of datagrams, each behind its length, and a frame as the kernel gives it.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, u8, Vec<u8>)> {
    use super::tests::{merge, packet, stream};
    let framed = |packets: &[Vec<u8>]| -> Vec<u8> {
        let one = |packet: &Vec<u8>| [&(packet.len() as u16).to_be_bytes()[..], packet].concat();
        packets.iter().flat_map(one).collect()
    };
    let four = stream(false, 7, 1000, 100, &[5; 250]);
    let six = stream(true, 7, u32::MAX - 50, 100, &[5; 250]);
    let datagrams = [
        packet(false, 1, None, &[6; 40]),
        packet(false, 2, None, &[6; 9]),
    ];
    vec![
        ("stream", 1, framed(&four)),
        ("stream-v6", 1, framed(&six)),
        ("datagrams", 1, framed(&datagrams)),
        ("frame", 0xfe, merge(&four).remove(0)),
        ("frame-of-datagrams", 0xfe, merge(&datagrams).remove(0)),
    ]
}
