//! Tests of the arena: a run has one owner, its bytes do not change under a pin, and it comes back
//! exactly once.

use super::*;

const STEPS: u64 = if cfg!(miri) { 40 } else { 20_000 };

/// Two frames over the same bytes would corrupt pages silently.
#[test]
#[cfg_attr(miri, ignore = "megabytes, byte by byte")]
fn frames_are_disjoint_aligned_and_come_back() {
    let mut arena = Arena::new(1100).unwrap();
    let mut frames: Vec<Frame> = Vec::new();
    for order in (0..=9).rev() {
        let mut frame = arena.alloc(order).unwrap();
        assert_eq!(frame.len(), BLOCK << order);
        assert!(frame.as_ptr().addr().is_multiple_of(BLOCK));
        frame.try_mut().unwrap().fill(order);
        frames.push(frame);
    }
    assert!(arena.alloc(9).is_none());
    assert!(arena.alloc(10).is_none());
    for (frame, order) in frames.iter().zip((0..=9).rev()) {
        assert!(frame.iter().all(|&b| b == order), "{frame:?} was overwritten");
    }
    assert_eq!(arena.free_blocks(), 1100 - 1023);
}

/// Fragmentation by earlier frames must never make memory run out.
#[test]
#[cfg_attr(miri, ignore = "thousands of frames")]
fn everything_returned_can_be_had_again() {
    let mut arena = Arena::new(1024).unwrap();
    for _ in 0..3 {
        let small: Vec<Frame> = std::iter::from_fn(|| arena.alloc(0)).collect();
        assert_eq!((small.len(), arena.free_blocks()), (1024, 0));
        drop(small);
        assert_eq!(arena.free_blocks(), 1024);
        let large: Vec<Frame> = std::iter::from_fn(|| arena.alloc(9)).collect();
        assert_eq!(large.len(), 2);
    }
}

/// A reader that holds a page must never see it change.
#[test]
fn a_pinned_frame_is_not_written_and_not_reused() {
    let mut arena = Arena::new(1).unwrap();
    let mut frame = arena.alloc(0).unwrap();
    frame.try_mut().unwrap().fill(7);
    let pin = frame.pin();
    let second = pin.clone();
    assert_eq!(frame.pins(), 2);
    assert!(frame.try_mut().is_none());
    drop(pin);
    drop(frame);
    assert_eq!(arena.free_blocks(), 0, "an orphan is not free");
    assert!(arena.alloc(0).is_none());
    assert!(second.iter().all(|&b| b == 7));
    drop(second);
    assert_eq!(arena.free_blocks(), 1);
    assert!(arena.alloc(0).unwrap().try_mut().is_some());
}

/// A page held by a caller stays readable after the store is gone.
#[test]
fn a_pin_outlives_the_arena() {
    let mut arena = Arena::new(3).unwrap();
    let mut frame = arena.alloc(1).unwrap();
    frame.try_mut().unwrap().fill(9);
    let pin = frame.pin();
    drop(arena);
    drop(frame);
    assert!(std::thread::spawn(move || pin.iter().all(|&b| b == 9)).join().unwrap());
}

/// An arena whose size is not a multiple of a huge page must not hand out memory beyond its end.
#[test]
fn any_number_of_blocks_is_handed_out_exactly() {
    let counts: &[u32] = if cfg!(miri) { &[1, 3, 9] } else { &[1, 2, 3, 511, 512, 513, 1025] };
    for &blocks in counts {
        let mut arena = Arena::new(blocks).unwrap();
        let frames: Vec<Frame> = std::iter::from_fn(|| arena.alloc(0)).collect();
        assert_eq!((frames.len() as u32, arena.blocks()), (blocks, blocks));
    }
    assert_eq!(Arena::new(0).unwrap_err().kind(), ErrorKind::Invalid);
}

/// Frames and pins are dropped on many threads in every order: no run may be lost, doubled, or
/// changed under a pin.
#[test]
fn drops_on_any_thread_return_each_run_once() {
    // Readers and channel together hold at most 40 frames of 4 blocks: fewer than all, or the test
    // would stall.
    let mut arena = Arena::new(256).unwrap();
    let (send, receive) = crossbeam::channel::bounded::<(Option<Frame>, FrameRef, u8)>(16);
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let receive = receive.clone();
            std::thread::spawn(move || {
                let mut held = std::collections::VecDeque::new();
                for (frame, pin, fill) in receive {
                    assert!(
                        pin.iter().step_by(512).all(|&b| b == fill),
                        "{pin:?} changed under its pin"
                    );
                    let clone = pin.clone();
                    drop(pin);
                    held.push_back((clone, frame));
                    if held.len() > 5 {
                        held.pop_front();
                    }
                }
            })
        })
        .collect();
    drop(receive);
    for step in 0..STEPS {
        let mut frame = loop {
            match arena.alloc((step % 3) as u8) {
                Some(frame) => break frame,
                None => std::thread::yield_now(),
            }
        };
        let fill = step as u8;
        frame.try_mut().expect("a fresh frame has no pins").fill(fill);
        let pin = frame.pin();
        let sent = if step % 2 == 0 { (Some(frame), pin, fill) } else { (None, pin, fill) };
        send.send(sent).unwrap();
    }
    drop(send);
    for reader in readers {
        reader.join().unwrap();
    }
    assert_eq!(arena.free_blocks(), 256);
}
