//! Takes numbers off the front of a fuzzer's bytes; when these are used up, it returns zeros for
//! ever.

/// The remaining bytes.
pub(super) struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes this many bytes, or the rest.
    pub fn take(&mut self, count: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        head
    }

    pub fn u8(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    pub fn u64(&mut self) -> u64 {
        let mut bytes = [0; 8];
        let taken = self.take(8);
        bytes[..taken.len()].copy_from_slice(taken);
        u64::from_le_bytes(bytes)
    }

    /// Takes a number below `bound`, which is at most 65,536.
    pub fn below(&mut self, bound: usize) -> usize {
        if bound <= 256 { self.u8() as usize % bound.max(1) } else { self.u16() as usize % bound }
    }

    /// Takes a number, mostly a small one, and now and then one of any size.
    pub fn number(&mut self) -> u64 {
        match self.u8() {
            255 => self.u64(),
            small => u64::from(small),
        }
    }
}
