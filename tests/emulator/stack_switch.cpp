// Switches stacks, so that the emulator can suspend and resume a thread.

#if !defined(__x86_64__)
#error "the emulator's stack switch is implemented for x86-64 only"
#endif

// Saves the callee-saved registers (System V ABI), switches the stack pointer, restores them. rdi:
// where to store the old stack pointer; rsi: the new stack pointer.
asm(R"(
.text
.globl fused_resnet_switch_stack
.hidden fused_resnet_switch_stack
.type fused_resnet_switch_stack, @function
fused_resnet_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fused_resnet_switch_stack, .-fused_resnet_switch_stack
)");
